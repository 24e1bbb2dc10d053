"""Merge and inspect mutated adapter folders: what is accepted is what PEFT makes of them, all else is one sentence.

Each case is two adapters of one kind (plain, rsLoRA, patterns, DoRA, PiSSA, ...) of a tiny random Llama, saved by PEFT.
One of them, or both, are changed at random. They are merged into a folder, into the base model, and by another method,
and inspected, each in a process of its own. Wrong is: a traceback, an exit code without a sentence, an update that is
not the mean of those that PEFT merges, a file outside the output.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModelForCausalLM, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.reliability.adapter_mutations import Mutated, mutate
from benchmarks.reliability.children import Ended, contents, in_child, own_places, run_command
from benchmarks.reliability.counts import Outcome
from seedlora.adapters.config_keys import PLAIN_INITS
from seedlora.cli.main import main
from seedlora.merge.method_table import METHOD_TABLE
from seedlora.names import GREEDY
from tests.helpers.models import save_tiny_llama

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SEVEN = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
#: PEFT's configuration of each kind.
KINDS: Mapping[str, Mapping[str, Any]] = {
    "plain": {"target_modules": SEVEN},
    "two layers": {"target_modules": ["q_proj", "v_proj"]},
    "rslora": {"target_modules": ATTENTION, "use_rslora": True},
    "patterns": {"target_modules": SEVEN, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\..*": 3}},
    "dora": {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
    "pissa": {"target_modules": ["v_proj", "down_proj"], "init_lora_weights": "pissa"},
    "bias": {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
    "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
}
DENSE = [name for name in METHOD_TABLE if name != GREEDY]


class Worlds(NamedTuple):
    """Name the folders that are made once: the base model, and two good adapters of each kind."""

    base: Path
    adapters: Path


def make_world(folder: Path) -> Worlds:
    """Make the base model and the good adapters."""
    base, adapters = folder / "base", folder / "good"
    save_tiny_llama(base, seed=0, hidden_size=16, intermediate_size=24, attention_bias=True)
    torch.manual_seed(0)  # PEFT draws the factors' start
    for kind, options in KINDS.items():
        for seed in (1, 2):
            config = LoraConfig(r=3, lora_alpha=7, task_type="CAUSAL_LM", **options)
            model = get_peft_model(_load(base), config)
            generator = torch.Generator().manual_seed(seed)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.data = parameter.data * (1 + 0.3 * noise) + 0.1 * noise * ("magnitude" not in name)
            model.save_pretrained(adapters / kind / str(seed))
            file = adapters / kind / str(seed) / "adapter_config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}))
    _warm_up(folder, base, adapters)
    return Worlds(base, adapters)


def _warm_up(folder: Path, base: Path, adapters: Path) -> None:
    """Run each command once in this process, so that those that are forked from it import nothing."""
    given = [str(adapters / "dora" / name) for name in "12"]
    with contextlib.redirect_stdout(io.StringIO()):
        for words in (
            ["merge", *given, "--out", str(folder / "out"), "--base", str(base)],
            ["merge", *given, "--out", str(folder / "whole"), "--into_base", str(base)],
            ["inspect", given[0], "--base", str(base)],
            ["compare", *given, "--base", str(base)],
        ):
            if main(words):
                raise RuntimeError(f"the good adapters fail: {words}")


def tried(seed: int, world: Worlds, folder: Path) -> Outcome:
    """Make the mutated adapters of a seed in a folder, and run the commands on them."""
    started, rng = time.monotonic(), random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    work = folder / "work"
    work.mkdir(parents=True)
    kind = rng.choice(list(KINDS))
    for name in "ab":
        shutil.copytree(world.adapters / kind / ("1" if name == "a" else "2"), work / name)
    mutated = mutate(rng, work, kind=kind)
    case = f"{kind}: {mutated.said}"
    with own_places(folder):
        commands = _run_all(rng, mutated, work, world)
    wrong = [f"{name}: {ended.wrong}" for name, ended in commands.items() if ended.wrong]
    kinds = [f"{name}, {'done' if ended.code == 0 else 'refused'}" for name, ended in commands.items()]
    strange = _strange(folder, work)
    wrong += [f"wrote {', '.join(strange)}"] if strange else []
    if not wrong and 0 in (commands["soup"].code, commands["into base"].code):
        try:
            compared = in_child(lambda: _compare(mutated.adapters, work, world.base, commands))
        except RuntimeError as error:
            compared = Compared("nothing", [f"accepted, but not to be compared: {str(error).strip()[-200:]}"])
        kinds.append(f"compared with {compared.against}")
        wrong += compared.wrong
    said = tuple(f"{name}: {ended.said}" for name, ended in commands.items())
    return Outcome(seed, case, said, time.monotonic() - started, "; ".join(wrong), tuple(kinds))


def _run_all(rng: random.Random, mutated: Mutated, work: Path, world: Worlds) -> dict[str, Ended]:
    """Run the commands, and look whether one of them changes a file that is there."""
    run = partial(run_command, main, cwd=work)
    base = ["--base", str(world.base)] if rng.random() < 0.3 else []
    other, given = rng.choice(DENSE), list(mutated.adapters)
    # DoRA's updates have full rank, 16 here, and what is compressed is not compared.
    whole = ["--rank", "16"] if mutated.kind == "dora" else []
    more = {
        "another method": ["merge", *given, "--method", other, "--out", "other", *base, "--json"],
        "inspect": ["inspect", given[0], *base],
        "compare": ["compare", *given, *base] if len(given) > 1 else ["inspect", given[0], "--json"],
    }
    name, words = rng.choice(list(more.items()))
    return {
        "soup": run(["merge", *given, "--method", "soup", "--out", mutated.out, *base, *whole]),
        "into base": run(["merge", *given, "--method", "soup", "--into_base", str(world.base), "--out", "whole"]),
        name: run(words),
    }


def _strange(folder: Path, work: Path) -> list[str]:
    """Return files that belong neither to the case nor to an output, and what a command left behind."""
    names = {"a", "b", "links", "fused", "whole", "other", "deep", "made.json"}
    found = [path.name for path in work.iterdir() if path.name not in names]
    found += [str(path.relative_to(folder)) for path in (folder / "tmp").iterdir() if "seedlora-error" in path.name]
    found += [path.name for path in folder.iterdir() if path.name not in {"work", "home", "tmp", "cache"}]
    made = json.loads((work / "made.json").read_text())
    now = {name: hashed for name, hashed in contents(work).items() if name.split("/")[0] in {"a", "b", "links"}}
    return found + [f"{name} (changed)" for name in sorted({*made} | {*now}) if made.get(name) != now.get(name)]


class Compared(NamedTuple):
    """Hold what accepted merges were compared with, and what is wrong with them."""

    against: str
    wrong: list[str]


@dataclass(frozen=True)
class _Reference:
    """Hold what an adapter changes, by the key of the weight, in float64, and who says so."""

    changes: Mapping[str, Tensor]
    source: str


def _compare(adapters: Sequence[str], work: Path, base: Path, commands: Mapping[str, Ended]) -> Compared:
    """Compare the results with the mean of the adapters, each as PEFT merges it."""
    found = [_reference(work / name, base) for name in adapters]
    before, mean = _weights(_load(base)), {}
    for key in before:
        mean[key] = sum((each.changes.get(key, torch.zeros(())) for each in found), torch.zeros(())) / len(found)
    sources = sorted({each.source for each in found})
    wrong, zero = [], not any(bool(change.any()) for change in mean.values())
    if commands["soup"].code == 0:
        tolerance = _tolerance(work / "fused")
        wrong += _difference("soup", _reference(work / "fused", base, strict=True).changes, mean, tolerance)
        if zero and "will change nothing" not in " ".join(commands["soup"].out.split()):
            wrong.append("soup: says nothing of a result that is all zeros")
    if commands["into base"].code == 0:
        whole = _weights(_load(work / "whole"))
        wrong += _difference("into base", {key: whole[key] - before[key] for key in before}, mean, 1e-5)
    return Compared(" and ".join(sources), wrong)


def _difference(name: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float) -> list[str]:
    """Say where a change is not what is wanted; the weights' own rounding is not counted."""
    said = []
    for key, change in wanted.items():
        off = float((found.get(key, torch.zeros(())) - change).norm())
        if not off <= tolerance * float(change.norm()) + 1e-5:
            said.append(f"{name}: {key} is {off / max(float(change.norm()), 1e-30):.2g} off")
    return said[:2]


def _tolerance(folder: Path) -> float:
    """Return how far the dtype of a result lets it be off."""
    dtypes = {tensor.dtype for tensor in load_file(folder / "adapter_model.safetensors").values()}
    return max(3 * torch.finfo(dtype).eps for dtype in dtypes) + 1e-5


def _load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _weights(model: Any) -> dict[str, Tensor]:
    """Return the weights in float64, under the names that they have without an adapter."""
    return {key.replace(".base_layer", ""): value.double() for key, value in model.state_dict().items()}


def _reference(folder: Path, base: Path, *, strict: bool = False) -> _Reference:
    """Return what PEFT merges; if it does not find the layers, what it merges once wrappers are out of the keys.

    Raises:
        RuntimeError: if PEFT cannot say.
    """
    try:
        return _Reference(_merged_by_peft(folder, base), "PEFT")
    except Exception as error:
        if strict:
            raise RuntimeError(f"PEFT does not load the result: {error}") from None
    with tempfile.TemporaryDirectory() as plain:
        shutil.copytree(folder, plain, dirs_exist_ok=True)
        file = Path(plain) / "adapter_model.safetensors"
        wrappers = r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module|default)\."
        inner = {re.sub(wrappers, "", key): tensor for key, tensor in load_file(file).items()}
        save_file({f"base_model.model.{key.replace('base_model.model.', '')}": t for key, t in inner.items()}, file)
        _name_targets(Path(plain))
        return _Reference(_merged_by_peft(Path(plain), base), "PEFT on plain keys")


def _name_targets(folder: Path) -> None:
    """Name the layers of the file where no targets are named: by itself PEFT would take some of a table of its own."""
    file = folder / "adapter_config.json"
    entries = json.loads(file.read_text(encoding="utf-8"))
    if entries.get("target_modules") is None:
        layers = {key.split(".lora_")[0].split(".")[-1] for key in load_file(folder / "adapter_model.safetensors")}
        file.write_text(json.dumps(entries | {"target_modules": sorted(layers)}))


def _merged_by_peft(folder: Path, base: Path) -> dict[str, Tensor]:
    """Return what PEFT's own merge changes; raise whatever it raises, and if it leaves out a tensor."""
    model = _load(base)
    before = _weights(model)
    config = LoraConfig.from_pretrained(str(folder))
    if config.init_lora_weights in PLAIN_INITS:  # the factors are read, and a start may want an even rank: seed 272
        config.init_lora_weights = True
    adapted = PeftModelForCausalLM(model, config)
    loaded = adapted.load_adapter(str(folder), "default")
    if lacking := _half_pairs(loaded.missing_keys) + list(loaded.unexpected_keys):
        raise RuntimeError(f"PEFT does not find {lacking[0]}")
    # PEFT loads its copy of an embedding, rounded to the dtype of the file, over the base's own: seed 171.
    copied = {key for key in load_file(folder / "adapter_model.safetensors") if key.endswith(".base_layer.weight")}
    for name, parameter in model.named_parameters():
        if f"base_model.model.{name}" in copied:
            parameter.data = before[name.replace(".base_layer", "")].to(parameter.dtype)
    after = _weights(adapted.merge_and_unload())
    return {key: after[key] - before[key] for key in before}


def _half_pairs(missing: Sequence[str]) -> list[str]:
    """Return the factors that a file lacks, but for layers of which it has neither: PEFT adds nothing to these."""
    factors = {key for key in missing if "lora_" in key}
    other = {"lora_A": "lora_B", "lora_B": "lora_A", "lora_embedding_A": "lora_embedding_B"}
    other |= {"lora_embedding_B": "lora_embedding_A"}
    return [
        key for key in sorted(factors) if not any(a in key and key.replace(a, b) in factors for a, b in other.items())
    ]
