"""Padding of a forward by each way of laying out rows, and the time of a step without it.

    python benchmarks/packing.py                 # padding of GSM8K's lengths, and the time of a step
    python benchmarks/packing.py --no-time       # padding alone

The lengths are those of GSM8K's 1,319 test rows, questions with worked answers in the style ``alpaca``, tokenised by
SmolLM2; 7,473 rows, as many as there are training rows, are drawn from them with replacement. Padding is that of a
forward of three seeds with 8 rows each, in optimizer steps of 8 and of 128 rows.

The time is that of a stacked step of three seeds of a small Llama (6 layers of 512) in processor seconds of one thread:
each row on its own, packed by a mask, and joined; the median of several steps, in turns, and the ratios of one run.
Rows of nearly one length follow, of which there is little padding: what joining costs where it saves nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import shapes  # benchmarks/shapes.py, which is beside this file
import torch

from seedlora.datamodules import GSM8K
from seedlora.datamodules.rows import ReplicaRows, TokenRows
from seedlora.datamodules.sampler import ReplicaSampler
from seedlora.evaluation.tasks import TASKS
from seedlora.model.embedded import EMBEDDED
from seedlora.model.loading import load_tokenizer
from seedlora.run.ensemble import Ensemble
from seedlora.run.ensemble_options import EnsembleOptions
from seedlora.training.micro_batch import micro_batch_losses
from seedlora.training.module import SeedLoRAModule
from seedlora.training.replicas import FitSettings

SEEDS = (11, 42, 202)
ROWS, BATCH, PACK_TOKENS = 7_473, 8, 2_048
LAYOUTS = {
    "each row on its own": {},
    f"packs of {PACK_TOKENS:,}": {"pack_tokens": PACK_TOKENS},
    "joined": {"joined": True},
}


def gsm8k_rows() -> TokenRows:
    """Rows of GSM8K's lengths."""
    packaged = TASKS["gsm8k"].packaged
    assert packaged is not None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "gsm8k.jsonl"
        file.write_bytes(packaged.cached())
        data = GSM8K(str(file), val_fraction=0)
        data.tokenizer = load_tokenizer(EMBEDDED)
        data.setup()
    rows = data.rows["train"]
    return rows.take(np.random.default_rng(0).integers(0, len(rows), ROWS))


def alike(rows: TokenRows, spread: float) -> TokenRows:
    """The rows whose lengths are within a part of the median."""
    median = np.median(rows.lengths)
    return rows.take(np.nonzero(np.abs(rows.lengths - median) <= spread * median)[0])


def paddings(rows: TokenRows, accumulate: int) -> dict[str, float]:
    """The padding of each layout."""
    step = {"seeds": SEEDS, "batch_size": BATCH, "accumulate": accumulate}
    return {name: ReplicaSampler(rows, **step, **layout).padding() for name, layout in LAYOUTS.items()}


def seconds(module: SeedLoRAModule, rows: TokenRows, steps: int) -> dict[str, float]:
    """The processor seconds of a forward and backward of each layout; the first step of each is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    for step in range(steps + 1):
        for name, layout in LAYOUTS.items():
            sampler = ReplicaSampler(rows, seeds=SEEDS, batch_size=BATCH, **layout)
            batch = ReplicaRows(rows)[next(sampler.micro_batches(step))]
            began = time.process_time()
            found = micro_batch_losses(
                batch, module.replicas, module.stack, module.token_losses, dropout_key=None, reduce=lambda each: each
            )
            found.sums.sum().backward()
            if step:
                taken[name].append(time.process_time() - began)
    return {name: statistics.median(each) for name, each in taken.items()}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, found = gsm8k_rows(), {}
    print(f"{len(rows):,} rows of {rows.lengths.min()} to {rows.lengths.max()} tokens, mean {rows.lengths.mean():.0f}")
    for accumulate in (1, 16):
        found[f"steps of {BATCH * accumulate} rows"] = padding = paddings(rows, accumulate)
        shown = ", ".join(f"{name} {part:.1%}" for name, part in padding.items())
        print(f"padding in steps of {BATCH * accumulate} rows: {shown}")
    if not options.no_time:
        with tempfile.TemporaryDirectory() as folder:
            module = SeedLoRAModule(shapes.random_model("llama6", Path(folder)))
            module.prepare_fit(FitSettings(Ensemble(EnsembleOptions(seeds=SEEDS)).replicas))
            module.setup("fit")
            module.model.train()
            kinds = {"all rows": rows, "within 20 % of the median": alike(rows, 0.2), "within 4 %": alike(rows, 0.04)}
            for name, some in kinds.items():
                each, padding = seconds(module, some, options.steps), paddings(some, 1)
                found[name] = {"seconds": each, "padding": padding}
                print(f"{name}: processor seconds of a step, times joined, padding")
                for way, taken in each.items():
                    ratio = taken / each["joined"]
                    print(f"    {way:20} {taken:6.2f} {ratio:6.2f} {padding[way]:6.1%}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
