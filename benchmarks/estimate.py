"""What the runs of the paper take, by arithmetic: the table of docs/scale.md, and hours and memory in configs/*.yaml.

    python benchmarks/estimate.py              # the table
    python benchmarks/estimate.py --configs    # a line for each file

Operations are those of ``seedlora.run.operations.Work``, memory is ``seedlora.run.memory.step_memory`` of a micro-batch
of rows of full length. Neither is measured. The models are built from the numbers below without weights; nothing is
downloaded.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from seedlora.distributed.strategies import ONE_PROCESS, Sharding
from seedlora.model.recomputation import WHOLE_LAYERS
from seedlora.names import FULL
from seedlora.run.memory import step_memory
from seedlora.run.operations import work
from seedlora.training.module import SeedLoRAModule

CONFIGS = Path(__file__).parents[1] / "configs"
#: bfloat16 operations of an H100 (SXM) in a second by its data sheet, and the part of it that is taken to be reached
PEAK, REACHED = 989e12, 0.4
#: Part of the tokens that is scored: MetaMathQA's; it counts for little.
SCORED = 0.6
#: Tokens of an epoch, padding not counted: taken to be, from the sets' numbers of rows and usual lengths.
TOKENS = {
    "MetaMathQA": 102.7e6,
    "CodeFeedback": 73.0e6,
    "Tulu": 179.3e6,
    "Commonsense170k": 22.1e6,
    "GSM8K": 1.78e6,
}
#: hidden size, feed-forward size, layers, heads, heads of keys and values
SHAPES = {
    "meta-llama/Llama-2-7b-hf": (4096, 11008, 32, 32, 32),
    "meta-llama/Llama-2-13b-hf": (5120, 13824, 40, 40, 40),
    "meta-llama/Llama-2-70b-hf": (8192, 28672, 80, 64, 8),
    "mistralai/Mistral-7B-v0.1": (4096, 14336, 32, 32, 8),
}
VOCABULARY = 32000
TABLE_OF = "llama2_7b_metamathqa_equal_budget"
#: rows of the table: words, model, options, ZeRO stage (FSDP2 is 3), numbers of GPUs
ROWS: tuple[tuple[str, str, dict[str, str], int, tuple[int, ...]], ...] = (
    ("7B, `ddp`", "meta-llama/Llama-2-7b-hf", {}, 0, (1, 4, 8)),
    ("13B, `ddp`", "meta-llama/Llama-2-13b-hf", {}, 0, (1, 4, 8)),
    ("70B in nf4 (QLoRA), `ddp`", "meta-llama/Llama-2-70b-hf", {"quantization": "nf4"}, 0, (1, 4, 8)),
    ("70B, `fsdp2` or stage 3", "meta-llama/Llama-2-70b-hf", {}, 3, (4, 8)),
)


@dataclass(frozen=True)
class Estimate:
    """Of a run: hours, tokens of all seeds, and GiB on each GPU, in all and of the base model."""

    hours: float
    tokens: float
    memory: float
    base: float


def estimate(config: Mapping[str, Any], root: Path, *, shared: Sharding = ONE_PROCESS, **model: str) -> Estimate:
    """Time and memory of the run that a file in configs/ describes.

    Args:
        config: as it is written.
        root: where to put the models' configurations.
        shared: among how many GPUs, and what they share.
        model: options of the model that are different.
    """
    options = {**config["model"], **model}
    model_options = SeedLoRAModule(model_folder(options.pop("base_model"), root), **options).options
    ensemble, rows = config["ensemble"], config["data"]["init_args"]
    seeds = len(ensemble["seeds"])
    runs = seeds if ensemble["budget"] == "full" else 1
    data = config["data"]["class_path"].removeprefix("seedlora.datamodules.")
    tokens = runs * config["trainer"]["max_epochs"] * TOKENS[data]
    recomputed = model_options.gradient_checkpointing == WHOLE_LAYERS
    operations = work(model_options).operations(tokens=int(tokens), scored=int(SCORED * tokens), recomputed=recomputed)
    stack = ensemble["stack_size"] or (1 if model_options.is_full_finetuning else seeds)
    large = stack * rows["batch_size"] * rows["max_length"]
    size = {"tokens": large, "supervised": int(SCORED * large), "longest": rows["max_length"]}
    memory = step_memory(model_options, stack, **size, shared=shared, device=torch.device("cuda"))
    hours = operations / (PEAK * REACHED) / 3600 / shared.processes
    return Estimate(hours, tokens, memory.total / 2**30, memory.base / 2**30)


def of_config(config: Mapping[str, Any], root: Path) -> Estimate:
    """As :func:`estimate`, on the GPUs that the header names: one, or for whole weights eight under ZeRO-2."""
    return estimate(config, root, shared=Sharding(2, 8) if config["model"]["adapter"] == FULL else ONE_PROCESS)


def model_folder(name: str, root: Path) -> str:
    """A folder with the configuration of a model, for its shapes."""
    folder = root / name
    if not folder.is_dir():
        folder.mkdir(parents=True)
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        kind = {"model_type": "mistral" if "Mistral" in name else "llama", "vocab_size": VOCABULARY}
        shape = dict(zip(names, SHAPES[name], strict=True))
        (folder / "config.json").write_text(json.dumps({**kind, **shape, "tie_word_embeddings": False}))
    return str(folder)


def table(root: Path) -> str:
    """The table of docs/scale.md."""
    config = yaml.safe_load((CONFIGS / f"{TABLE_OF}.yaml").read_text(encoding="utf-8"))
    lines = ["| model | 1 H100 | 4 H100 | 8 H100 |", "|---|---|---|---|"]
    for words, name, more, stage, numbers in ROWS:
        cells = []
        for gpus in (1, 4, 8):
            if gpus not in numbers:
                cells.append("does not fit")
                continue
            options = {"gradient_checkpointing": WHOLE_LAYERS, **more}
            found = estimate(config, root, shared=Sharding(stage, gpus), base_model=name, **options)
            cells.append(f"{shown(found.hours)} h, {found.memory:.0f} GiB ({found.base:.0f})")
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(hours: float) -> str:
    """Two digits."""
    return f"{hours:.2g}" if hours < 100 else f"{hours:.0f}"


def main() -> None:
    """Print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", action="store_true", help="a line for each file in configs/")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if not options.configs:
            print(table(Path(folder)))
            return
        for file in sorted(CONFIGS.glob("*_*.yaml")):
            found = of_config(yaml.safe_load(file.read_text(encoding="utf-8")), Path(folder))
            print(f"{file.stem}: {shown(found.hours)} h, {found.tokens / 1e6:,.0f} M tokens, {found.memory:.0f} GiB")


if __name__ == "__main__":
    main()
