"""The memory estimate of the plan against the measured peak of training, each setting in its own process.

    python benchmarks/memory.py                       # goes on where it was stopped, if --out is given
    python benchmarks/memory.py --only smollm2        # settings whose line has this in it
    python benchmarks/memory.py --fixed               # rows of one length, other adapters and weights in few bits
    python benchmarks/memory.py --seeds 1 3 6         # how the peak grows with the seeds in the stack

The settings have rows of real lengths: a skewed distribution, as chats have, most rows short and a few as long as they
may be. Trained are the largest forward of the epoch, which the estimate is of, and two others. Printed are estimate,
peak of the process beside what it held before the model was loaded, and their ratio; the process is as a user's is,
with the allocator that it has.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import shapes  # benchmarks/shapes.py, which is beside this file
import torch

from seedlora.callbacks import SeedEnsembleCallback
from seedlora.datamodules.rows import MicroBatch, ReplicaRows, TokenRows
from seedlora.datamodules.sampler import ReplicaSampler
from seedlora.model.embedded import EMBEDDED
from seedlora.run.cost import PeakMemory
from seedlora.run.memory import Memory, memory_of
from seedlora.training.module import SeedLoRAModule
from seedlora.utils.files import atomic_file

#: Rows of a setting.
ROWS = 300


@dataclass(frozen=True)
class Setting:
    """One line of the table: model, seeds, rows of each in a forward, longest row, and how they are laid out."""

    model: str
    seeds: int
    batch: int
    longest: int
    pack_tokens: int | None = None
    recomputed: str = "none"
    options: dict[str, Any] = field(default_factory=dict)
    #: Tokens of every row, and scored ones; None: rows of real lengths
    fixed: tuple[int, int] | None = None
    #: All rows of a forward follow each other without padding: what ``pack_tokens auto`` does.
    joined: bool = False

    def __str__(self) -> str:
        rows = f"rows of {self.fixed[0]}, {self.fixed[1]} scored" if self.fixed else f"rows up to {self.longest}"
        words = [f"{self.model}, {self.seeds} x {self.batch} {rows}"]
        words += [f"packed to {self.pack_tokens}"] if self.pack_tokens else []
        words += ["joined"] if self.joined else []
        words += [f"{self.recomputed} recomputation"] if self.recomputed != "none" else []
        return ", ".join(words + [f"{name} {value}" for name, value in self.options.items()])


REAL = (
    Setting("smollm2", 3, 4, 256),
    Setting("smollm2", 3, 8, 256, 256),
    Setting("smollm2", 3, 8, 512, 512),
    Setting("smollm2", 1, 8, 1024, 1024),
    Setting("smollm2", 1, 4, 512, None, "selective"),
    Setting("smollm2", 3, 8, 512, 1024, "full"),
    Setting("wide4", 3, 4, 512),
    Setting("wide4", 3, 8, 512, 512, "selective"),
    Setting("qwen10", 3, 4, 256),
    Setting("qwen10", 2, 8, 512, 1024),
    Setting("qwen10", 3, 4, 512, None, "selective"),
    Setting("llama6", 3, 8, 512, 512),
    Setting("smollm2", 3, 4, 256, joined=True),
    Setting("qwen10", 3, 8, 512, joined=True),
    Setting("wide4", 3, 8, 512, None, "selective", joined=True),
    Setting("smollm2", 3, 4, 256, None, "full", joined=True),
    Setting("wide4", 3, 8, 512, None, "full", joined=True),
    Setting("qwen10", 3, 4, 512, None, "full"),
)
FIXED = (
    Setting("smollm2", 3, 8, 29, fixed=(29, 4)),
    Setting("smollm2", 1, 4, 256, fixed=(256, 128)),
    Setting("smollm2", 1, 4, 512, None, "full", fixed=(512, 256)),
    Setting("llama6", 3, 4, 256, fixed=(256, 64)),
    Setting("llama6", 3, 2, 512, fixed=(512, 512)),
    Setting("wide4", 2, 4, 300, fixed=(300, 50)),
    # one small step with the weights in 16, 8 and 4 bits, and DoRA beside LoRA
    Setting("smollm2", 3, 1, 29, fixed=(29, 4)),
    Setting("smollm2", 3, 1, 29, options={"quantization": "int8"}, fixed=(29, 4)),
    Setting("smollm2", 3, 1, 29, options={"quantization": "nf4"}, fixed=(29, 4)),
    Setting("wide6", 3, 1, 29, fixed=(29, 4)),
    Setting("wide6", 3, 1, 29, options={"quantization": "nf4"}, fixed=(29, 4)),
    Setting("smollm2", 1, 4, 256, options={"adapter": "dora"}, fixed=(256, 128)),
    # weights in full: some beside the adapter, and all
    Setting("smollm2", 3, 1, 29, options={"modules_to_save": ["embed_tokens"]}, fixed=(29, 4)),
    Setting("smollm2", 1, 4, 256, options={"adapter": "full"}, fixed=(256, 128)),
    Setting("llama6", 1, 4, 256, options={"adapter": "full"}, fixed=(256, 64)),
)
#: added where a GPU is
GPU = (
    Setting("smollm2_random", 3, 16, 512, fixed=(512, 256)),
    Setting("llama2_7b", 1, 8, 512, None, "full", fixed=(512, 256)),
    Setting("llama2_7b", 3, 8, 512, None, "full", fixed=(512, 256)),
    Setting("llama2_7b", 3, 8, 512, None, "selective", fixed=(512, 256)),
    Setting("llama2_7b", 3, 4, 512, fixed=(512, 256)),
    Setting("llama2_7b", 3, 8, 512, None, "full", {"adapter": "dora"}, fixed=(512, 256)),
    Setting("llama2_7b", 3, 8, 512, None, "full", {"quantization": "nf4"}, fixed=(512, 256)),
)


def token_rows(setting: Setting, vocabulary: int) -> TokenRows:
    """Random tokens; the lengths are log-normal, with a median of an eighth of the longest, and cut there."""
    generator = np.random.default_rng(0)
    lengths, scored = np.full(ROWS, setting.longest), np.full(ROWS, setting.longest // 2)
    if setting.fixed:
        lengths, scored = np.full(ROWS, setting.fixed[0]), np.full(ROWS, setting.fixed[1])
    else:
        drawn = generator.lognormal(np.log(setting.longest / 8), 0.9, ROWS)
        lengths = np.clip(drawn.astype(int), 8, setting.longest)
        scored = np.maximum(lengths * generator.uniform(0.3, 0.9, ROWS), 1).astype(int)
    starts, total = np.cumsum(lengths) - lengths, int(lengths.sum())
    supervised = np.zeros(total, dtype=bool)
    for start, length, said in zip(starts, lengths, scored, strict=True):
        supervised[start + length - said : start + length] = True
        supervised[start] = False
    items = np.array([supervised[a : a + n].sum() for a, n in zip(starts, lengths, strict=True)])
    tokens = generator.integers(0, vocabulary, total, dtype=np.int32)
    return TokenRows(tokens, supervised, starts, lengths, items, np.arange(ROWS))


class Forwards(list[dict[str, Any]]):
    """Some batches, with the sampler of all."""

    def __init__(self, batches: list[dict[str, Any]], sampler: ReplicaSampler) -> None:
        super().__init__(batches)
        self.sampler = sampler


class LargestForwards(pl.LightningDataModule):
    """The largest forward of the epoch, and the first two."""

    def __init__(self, setting: Setting, vocabulary: int) -> None:
        super().__init__()
        self.counts: dict[str, Any] = {}
        self.rows = {"train": token_rows(setting, vocabulary)}
        self.batch_size, self.seeds = setting.batch, tuple(range(setting.seeds))
        self.pack_tokens, self.joined = setting.pack_tokens, setting.joined

    def micro_batches(self) -> Iterator[MicroBatch]:
        """Give the micro-batches of the epoch."""
        yield from self._sampler()

    def _sampler(self) -> ReplicaSampler:
        sizes = {"batch_size": self.batch_size, "pack_tokens": self.pack_tokens, "joined": self.joined}
        return ReplicaSampler(self.rows["train"], seeds=self.seeds, **sizes)

    def train_dataloader(self) -> Forwards:
        """Return three micro-batches, with a sampler that knows the whole epoch."""
        rows = ReplicaRows(self.rows["train"])
        every = [rows[micro] for micro in self.micro_batches()]
        largest = max(every, key=lambda batch: batch["input_ids"].numel())
        return Forwards([every[0], largest, every[1]], self._sampler())

    def val_dataloader(self) -> list[Any]:
        """Return nothing to validate on."""
        return []


def measure(setting: Setting, folder: str) -> dict[str, Any]:
    """Estimate and peak of three steps, in bytes."""
    options = {"r": 8, "lr_scheduler": "constant", **setting.options}
    module = SeedLoRAModule(folder, gradient_checkpointing=setting.recomputed, **options)
    data = LargestForwards(setting, module.options.outline.vocabulary)
    with tempfile.TemporaryDirectory() as run:
        ensemble = SeedEnsembleCallback(data.seeds, merge="none", budget="full", dirpath=Path(run) / "run")
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="gpu" if torch.cuda.is_available() else "cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            use_distributed_sampler=False,
            callbacks=[ensemble, FromTheFirstStep()],
        )
        estimate = memory_of(trainer, module.options, data)(setting.seeds)
        import peft  # noqa: F401 - what importing takes is not the run's
        import transformers  # noqa: F401

        trainer.peak = peak = PeakMemory(trainer.strategy.root_device)
        trainer.fit(module, datamodule=data)
        measured = peak.bytes
    return {"estimate": asdict(estimate), "measured": measured}


class FromTheFirstStep(pl.Callback):
    """Forgets the peak of loading, when files are in memory that can be dropped at any time."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget."""
        trainer.peak.forget()


def child(setting: Setting, root: Path) -> dict[str, Any]:
    """Measure in a process of its own, whose first steps would otherwise be warm."""
    folder = shapes.random_model(setting.model, root) if setting.model in shapes.SHAPES else EMBEDDED
    command = [sys.executable, __file__, "--child", json.dumps([asdict(setting), folder])]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=dict(os.environ)).stdout
    found: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of the settings: SmolLM2 with 12 rows in all")
    parser.add_argument("--fixed", action="store_true", help="rows of one length; on a GPU at the 7B shape too")
    parser.add_argument("--only", default="", help="settings whose line has this in it: nf4, 3 x 1")
    parser.add_argument("--folder", type=Path, help="where models of random weights are kept for the next time")
    parser.add_argument("--out", type=Path, help="written after each setting; what is in it is not measured again")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        given, folder = json.loads(options.child)
        print(json.dumps(measure(Setting(**given), folder)))
        return
    settings = (*FIXED, *(GPU if torch.cuda.is_available() else ())) if options.fixed else REAL
    if options.seeds:
        settings = tuple(Setting("smollm2", n, 12 // n, 128, fixed=(128, 64)) for n in options.seeds)
    records: dict[str, Any] = {}
    if options.out and options.out.is_file():
        records = {record["setting"]: record for record in json.loads(options.out.read_text(encoding="utf-8"))}
    with tempfile.TemporaryDirectory() as folder:
        for setting in settings:
            what = str(setting)
            if options.only not in what:
                continue
            if what not in records:
                found = child(setting, options.folder or Path(folder))
                ratio = Memory(**found["estimate"]).total / found["measured"]
                records[what] = {"setting": what, **found, "ratio": ratio}
            found = records[what]
            sizes = [size / 2**30 for size in (Memory(**found["estimate"]).total, found["measured"])]
            print(
                f"{what:62} {sizes[0]:5.2f} GiB estimated, {sizes[1]:5.2f} measured: {found['ratio']:.2f}", flush=True
            )
            if options.out:
                with atomic_file(options.out) as file:
                    file.write_text(json.dumps(list(records.values()), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
