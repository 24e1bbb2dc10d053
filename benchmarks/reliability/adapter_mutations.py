"""Change adapter folders at random, in the ways that real ones are strange."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.reliability.children import contents

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: Values of every type, for any key.
VALUES: list[Any] = [
    *(None, True, False, 0, 1, 2, 3, -1, 4, 7.0, 2.5, 1e31, float("nan"), float("inf"), 10**400),
    *("", "x", "q_proj", "all-linear", "(", "\ud83d", "a" * 100_000, "../..", "/etc/passwd"),
    *([], ["q_proj"], ["q_proj", "v_proj"], [1], [0], [[]], {}, {"q_proj": 2}, {"q_proj": "x"}, {"(": 2}, {"": 1}),
]
KEYS = [
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "peft_type", "init_lora_weights", "bias", "use_rslora"),
    *("base_model_name_or_path", "fan_in_fan_out", "use_dora", "modules_to_save", "task_type", "lora_bias", "revision"),
    *(
        "target_modules",
        "auto_mapping",
        "trainable_token_indices",
        "layers_to_transform",
        "layers_pattern",
        "use_qalora",
    ),
    *(
        "exclude_modules",
        "layer_replication",
        "target_parameters",
        "ensure_weight_tying",
        "corda_config",
        "peft_version",
    ),
    *("inference_mode", "lora_dropout", "use_something_new", "megatron_core", "arrow_config", "loftq_config"),
]
INITS = ["gaussian", "pissa", "pissa_niter_4", "olora", "loftq", "corda", "eva", "orthogonal", "lora_ga", "mica", "new"]


@dataclass(frozen=True)
class Mutated:
    """Name the adapters as the commands get them, the output, and what was done to them."""

    kind: str
    adapters: tuple[str, ...]
    out: str
    said: str


def mutate(rng: random.Random, work: Path, *, kind: str) -> Mutated:
    """Change the adapters ``a`` and ``b`` of a folder; one, or both in the same way."""
    said, count = [], rng.choice([1, 1, 1, 2, 3])
    for _ in range(count):
        change, seed = rng.choice(CHANGES), rng.random()
        folders = [work / "a", work / "b"] if rng.random() < 0.5 else [work / "a"]
        for folder in folders:
            note = change(random.Random(seed), folder)
        said.append(f"{change.__name__.strip('_')} {note}{' (both)' if len(folders) > 1 else ''}")
    adapters, out = _given(rng, work, said)
    (work / "made.json").write_text(
        json.dumps(
            {name: hashed for name, hashed in contents(work).items() if name.split("/")[0] in {"a", "b", "links"}}
        )
    )
    return Mutated(kind, adapters, out, "; ".join(said))


def _given(rng: random.Random, work: Path, said: list[str]) -> tuple[tuple[str, ...], str]:
    """Return how the adapters and the output are named: plainly, by links, or through ``..``."""
    adapters = rng.choice([("a", "b"), ("a", "b"), ("a", "b"), ("a",), ("b", "a")])
    how = rng.choice(["plain"] * 6 + ["dots", "linked", "linked files", "link as out"])
    out = "fused"
    if how == "dots":
        adapters, out = tuple(f"../work/a/../{name}" for name in adapters), "deep/../fused"
    elif how != "plain":
        (work / "links").mkdir()
        if how == "linked":
            for name in adapters:
                (work / "links" / name).symlink_to(work / name, target_is_directory=True)
            adapters = tuple(f"links/{name}" for name in adapters)
        elif how == "linked files":
            for file in (work / "a").iterdir():
                file.rename(work / "links" / file.name)
                file.symlink_to(work / "links" / file.name)
        else:
            (work / "fused").symlink_to(work / "whole" / ".." / "b", target_is_directory=True)
    said += [] if how == "plain" else [how]
    return adapters, out


def _config(folder: Path) -> dict[str, Any]:
    try:
        entries = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _write_config(folder: Path, entries: Any) -> None:
    if not (folder / CONFIG).is_dir():  # changed before
        (folder / CONFIG).write_text(json.dumps(entries), encoding="utf-8")


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(folder / WEIGHTS)
    except Exception:  # changed before
        return {}


def _write(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    file = folder / WEIGHTS
    if file.is_file():
        save_file(
            {key: tensor.contiguous().clone() for key, tensor in tensors.items()}, file, metadata={"format": "pt"}
        )


def _config_value(rng: random.Random, folder: Path) -> str:
    key, value = rng.choice(KEYS), rng.choice(VALUES)
    _write_config(folder, _config(folder) | {key: value})
    return f"{key} = {str(value)[:20]!a}"


def _config_init(rng: random.Random, folder: Path) -> str:
    init = rng.choice(INITS)
    _write_config(folder, _config(folder) | {"init_lora_weights": init})
    return init


def _config_removed(rng: random.Random, folder: Path) -> str:
    entries = _config(folder)
    key = rng.choice([*entries, ""])
    entries.pop(key, None)
    _write_config(folder, entries)
    return key


def _scaling(rng: random.Random, folder: Path) -> str:
    """Change what PEFT multiplies by; this is not wrong in itself."""
    edit = rng.choice(
        [
            {"lora_alpha": rng.choice([1, 12, 0.5, 0, -3, 1e-30])},
            {"use_rslora": True},
            {
                "alpha_pattern": {
                    rng.choice(["q_proj", "v_proj", ".*", "self_attn", r"model\.layers\.0\..*", "^q_proj$"]): 5
                }
            },
            {"rank_pattern": {rng.choice(["q_proj", ".*q_proj", "x"]): rng.choice([2, 3])}},
        ]
    )
    _write_config(folder, _config(folder) | edit)
    return str(edit)


def _targets(rng: random.Random, folder: Path) -> str:
    """Say other layers than those that there are factors of."""
    edit = rng.choice(
        [
            {"target_modules": ["q_proj"]},
            {"target_modules": "all-linear"},
            {"target_modules": r".*\.(q|v)_proj"},
            {"target_modules": None},
            {"exclude_modules": ["q_proj"]},
            {"layers_to_transform": [0]},
            {"layers_to_transform": 1, "layers_pattern": "layers"},
        ]
    )
    _write_config(folder, _config(folder) | edit)
    return str(edit)


def _base_name(rng: random.Random, folder: Path) -> str:
    name = rng.choice(
        [
            None,
            "",
            "nobody/nothing",
            "../base",
            "../../base",
            "/",
            "/etc",
            ".",
            "gpt2",
            7,
            ["x"],
            "a\0b",
            "~",
            "x" * 5000,
        ]
    )
    _write_config(folder, _config(folder) | {"base_model_name_or_path": name})
    return str(name)[:20]


def _config_bytes(rng: random.Random, folder: Path) -> str:
    return _change_bytes(rng, folder / CONFIG)


def _weight_bytes(rng: random.Random, folder: Path) -> str:
    return _change_bytes(rng, folder / WEIGHTS)


def _change_bytes(rng: random.Random, file: Path) -> str:
    data = file.read_bytes() if file.is_file() else b""
    at = rng.randrange(min(len(data), rng.choice([9, 300, len(data) + 1])) + 1)
    how = rng.choice(["cut", "flip", "insert", "empty", "pointer", "nested", "bom", "twice"])
    changed = {
        "cut": data[:at],
        "flip": data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :],
        "insert": data[:at] + rng.randbytes(rng.choice([1, 8, 300])) + data[at:],
        "empty": b"",
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "nested": b"[" * 100_000,
        "bom": b"\xef\xbb\xbf" + data,
        "twice": data + data,
    }[how]
    if file.is_file():
        file.write_bytes(changed)
    return f"{how} at {at}"


def _keys(rng: random.Random, folder: Path) -> str:
    """Name all tensors as another writer would, or as a wrapper around the model makes it."""
    how = rng.choice(
        ["default", "no prefix", "compile", "ddp", "fsdp", "twice", "upper", "dots", "transformer", "lora_a"]
    )
    renames: dict[str, Callable[[str], str]] = {
        "default": lambda key: key.replace("lora_A.weight", "lora_A.default.weight").replace(
            "lora_B.weight", "lora_B.default.weight"
        ),
        "no prefix": lambda key: key.removeprefix("base_model.model."),
        "compile": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
        "ddp": lambda key: f"module.{key}",
        "fsdp": lambda key: key.replace(".self_attn", "._fsdp_wrapped_module.self_attn"),
        "twice": lambda key: f"base_model.model.{key}",
        "upper": str.upper,
        "dots": lambda key: key.replace("model.layers", "../model.layers"),
        "transformer": lambda key: key.replace("model.layers", "transformer.h"),
        "lora_a": lambda key: key.replace("lora_A", "lora_a").replace("lora_B", "lora_b"),
    }
    _write(folder, {renames[how](key): tensor for key, tensor in _tensors(folder).items()})
    return how


def _one_key(rng: random.Random, folder: Path) -> str:
    tensors = _tensors(folder)
    if not tensors:
        return "none"
    key = rng.choice(sorted(tensors))
    how = rng.choice(
        ["removed", "pair removed", "default", "renamed", "index", "wrapper", "twice", "extra", "embedding"]
    )
    tensor = tensors[key] if how in ("twice", "extra") else tensors.pop(key)
    other = {
        "default": key.replace(".weight", ".default.weight"),
        "renamed": rng.choice(
            ["x", "", key[:-1], key + ".weight", key.replace("proj", "porj"), "../../" + key, "/" + key]
        ),
        "index": key.replace("layers.0", "layers.7").replace("layers.1", "layers.01"),
        "wrapper": key.replace("model.layers", "model._orig_mod.layers"),
        "twice": key.replace("base_model.model.", "base_model.model._orig_mod."),
        "extra": rng.choice(
            ["extra", "base_model.model.lm_head.weight", key.replace("lora_A", "lora_C"), key + "_scale"]
        ),
        "embedding": key.replace("lora_A.weight", "lora_embedding_A").replace("lora_B.weight", "lora_embedding_B"),
    }
    if how in other:
        tensors[other[how] or "empty"] = tensor
    elif how == "pair removed":
        tensors.pop(key.replace("lora_A", "lora_B") if "lora_A" in key else key.replace("lora_B", "lora_A"), None)
    _write(folder, tensors)
    return f"{how} {key[-40:]}"


def _dtypes(rng: random.Random, folder: Path) -> str:
    names = ["float16", "bfloat16", "float64", "int8", "uint8", "bool", "float8_e4m3fn", "complex64", "int64"]
    dtype, tensors = rng.choice(names[:3] if rng.random() < 0.6 else names), _tensors(folder)
    one = rng.choice(sorted(tensors)) if tensors and rng.random() < 0.4 else None
    _write(folder, {k: t.to(getattr(torch, dtype)) if one in (None, k) else t for k, t in tensors.items()})
    return f"{dtype} {'all' if one is None else one[-30:]}"


def _shapes(rng: random.Random, folder: Path) -> str:
    tensors = _tensors(folder)
    if not tensors:
        return "none"
    key, how = (
        rng.choice(sorted(tensors)),
        rng.choice(["turned", "longer", "shorter", "empty", "flat", "third", "scalar", "rank"]),
    )
    tensor = tensors[key]
    shaped: dict[str, Callable[[], torch.Tensor]] = {
        "turned": lambda: tensor.T,
        "longer": lambda: torch.cat([tensor, tensor[-1:]]),
        "shorter": lambda: tensor[:-1],
        "empty": lambda: tensor[:0],
        "flat": lambda: tensor.reshape(-1),
        "third": lambda: tensor[None],
        "scalar": lambda: tensor.sum(),
        "rank": lambda: tensor,
    }
    tensors[key] = shaped[how]()
    if how == "rank":
        tensors = {k: t[:2] if "lora_A" in k else t[:, :2] if "lora_B.w" in k else t for k, t in tensors.items()}
    _write(folder, tensors)
    return f"{how} {key[-30:]}"


def _values(rng: random.Random, folder: Path) -> str:
    tensors = _tensors(folder)
    if not tensors:
        return "none"
    key = rng.choice(sorted(tensors))
    how = rng.choice(["nan", "inf", "huge", "zeros", "all B zeros", "tiny", "opposite"])
    value = {"nan": float("nan"), "inf": float("-inf"), "huge": 1e38, "tiny": 1e-40}.get(how)
    if value is not None and tensors[key].is_floating_point() and tensors[key].numel():
        tensors[key].reshape(-1)[rng.randrange(tensors[key].numel())] = value
    elif how == "zeros":
        tensors[key] = torch.zeros_like(tensors[key])
    elif how == "all B zeros":
        tensors = {k: torch.zeros_like(t) if "lora_B" in k or "embedding_B" in k else t for k, t in tensors.items()}
    elif how == "opposite" and folder.name == "b":  # both together are nothing
        tensors = {k: -t if "lora_B" in k else t for k, t in _tensors(folder.with_name("a")).items()}
    _write(folder, tensors)
    return how


def _files(rng: random.Random, folder: Path) -> str:
    """Add, remove and replace files."""
    how = rng.choice(
        [
            *(
                "no config",
                "no weights",
                "bin",
                "sharded",
                "folder as config",
                "link loop",
                "link to nowhere",
                "prompt",
            ),
            *("base", "card", "tokenizer", "config.json", "prompt link", "template"),
        ]
    )
    weights, config = folder / WEIGHTS, folder / CONFIG
    if how in ("no config", "folder as config", "link loop"):
        config.unlink(missing_ok=True)
    if how in ("no weights", "bin", "sharded", "link to nowhere"):
        weights.unlink(missing_ok=True)
    odd = json.dumps(rng.choice([*VALUES, {"quantization": "nf4"}, {"template": "x", "chat": 7}]))
    actions: dict[str, Callable[[], object]] = {
        "bin": lambda: (folder / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n"),
        "sharded": lambda: (folder / "adapter_model-00001-of-00002.safetensors").write_bytes(b"x"),
        "folder as config": config.mkdir,
        "link loop": lambda: config.symlink_to(config),
        "link to nowhere": lambda: weights.symlink_to(folder / "nothing"),
        "prompt": lambda: (folder / "prompt.json").write_text(odd),
        "base": lambda: (folder / "base.json").write_text(odd),
        "card": lambda: (folder / "README.md").write_text("---\nbase_model: [x\n---\n<script>alert(1)</script>"),
        "tokenizer": lambda: (folder / "tokenizer.json").write_text(odd),
        "config.json": lambda: (folder / "config.json").write_text(odd),
        "prompt link": lambda: (folder / "prompt.json").symlink_to("/etc/hostname"),
        "template": lambda: (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}{% for %}"),
    }
    target = {"prompt": "prompt.json", "prompt link": "prompt.json", "base": "base.json"}.get(how)
    if target is not None:
        (folder / target).unlink(missing_ok=True)
    actions.get(how, lambda: None)()
    return how


CHANGES: list[Callable[[random.Random, Path], str]] = [
    *(
        _config_value,
        _config_value,
        _config_init,
        _config_removed,
        _scaling,
        _scaling,
        _targets,
        _base_name,
        _config_bytes,
    ),
    *(_weight_bytes, _keys, _keys, _one_key, _one_key, _dtypes, _shapes, _values, _values, _files),
]
