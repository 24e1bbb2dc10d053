"""The memory estimate of the plan against the measured peak of a training step, each setting in its own process.

    python benchmarks/memory.py
    python benchmarks/memory.py --seeds 1 3 6        # how the peak grows with the seeds in the stack

Prints estimate, measured peak of the training steps beside what the process held before the model was loaded, and their
ratio. glibc is told to give freed arrays back at once, so that what is measured is what is in use.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

import train as speed  # benchmarks/train.py, which is beside this file
from seedlora.callbacks import SeedEnsembleCallback
from seedlora.model.embedded import EMBEDDED
from seedlora.run.cost import PeakMemory
from seedlora.run.memory import Memory, step_memory
from seedlora.training.module import SeedLoRAModule

#: model, seeds, rows of each, tokens of a row, supervised tokens of a row, gradient checkpointing, options
SETTINGS: tuple[tuple[Any, ...], ...] = (
    ("smollm2", 3, 8, 29, 4, False, {}),
    ("smollm2", 1, 4, 256, 128, False, {}),
    ("smollm2", 1, 4, 512, 256, True, {}),
    ("llama6", 3, 4, 256, 64, False, {}),
    ("llama6", 3, 2, 512, 512, False, {}),
    ("wide4", 2, 4, 300, 50, False, {}),
    # one small step with the weights in 16, 8 and 4 bits, and DoRA beside LoRA
    ("smollm2", 3, 1, 29, 4, False, {}),
    ("smollm2", 3, 1, 29, 4, False, {"quantization": "int8"}),
    ("smollm2", 3, 1, 29, 4, False, {"quantization": "nf4"}),
    ("wide6", 3, 1, 29, 4, False, {}),
    ("wide6", 3, 1, 29, 4, False, {"quantization": "nf4"}),
    ("smollm2", 1, 4, 256, 128, False, {"adapter": "dora"}),
    # weights in full: some beside the adapter, and all
    ("smollm2", 3, 1, 29, 4, False, {"modules_to_save": ["embed_tokens"]}),
    ("smollm2", 1, 4, 256, 128, False, {"adapter": "none"}),
    ("llama6", 1, 4, 256, 64, False, {"adapter": "none"}),
)
#: added where a GPU is
GPU_SETTINGS: tuple[tuple[Any, ...], ...] = (
    ("smollm2_random", 3, 16, 512, 256, False, {}),
    ("llama2_7b", 1, 8, 512, 256, True, {}),
    ("llama2_7b", 3, 8, 512, 256, True, {}),
    ("llama2_7b", 3, 4, 512, 256, False, {}),
    ("llama2_7b", 3, 8, 512, 256, True, {"adapter": "dora"}),
    ("llama2_7b", 3, 8, 512, 256, True, {"quantization": "nf4"}),
)
#: as in benchmarks/train.py, and its own beside them
SHAPES = speed.SHAPES | {
    "llama6": (512, 1408, 6, 8, 8, 49152, False),
    "wide4": (1024, 2816, 4, 16, 16, 40960, False),
    "wide6": (1536, 4096, 6, 24, 24, 40960, False),
}


def model_folder(name: str, root: Path) -> str:
    """The embedded model, or a random Llama of another shape."""
    return speed.random_llama(SHAPES[name], root) if name in SHAPES else EMBEDDED


def measure(
    model: str, seeds: int, batch: int, tokens: int, supervised: int, checkpointing: bool, options: dict[str, Any]
) -> dict[str, Any]:
    """Estimate and peak of three steps, in bytes."""
    module = SeedLoRAModule(model, r=8, lr_scheduler="constant", gradient_checkpointing=checkpointing, **options)
    estimate = step_memory(
        module.options, seeds, tokens=seeds * batch * tokens, supervised=seeds * batch * supervised, longest=tokens
    )
    speed.ROWS["here"] = (tokens, supervised)
    with tempfile.TemporaryDirectory() as folder, speed.quiet():
        ensemble = SeedEnsembleCallback(range(seeds), merge="none", budget="full", dirpath=Path(folder) / "run")
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
        import peft  # noqa: F401 - what importing takes is not the run's
        import transformers  # noqa: F401

        trainer.peak = peak = PeakMemory(trainer.strategy.root_device)
        trainer.fit(module, datamodule=speed.StackedRows("here", batch, 3))
        measured = peak.bytes
    return {"estimate": asdict(estimate), "measured": measured}


class FromTheFirstStep(pl.Callback):
    """Forgets the peak of loading, when files are in memory that can be dropped at any time."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget."""
        trainer.peak.forget()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of the settings: SmolLM2 with 12 rows in all")
    parser.add_argument("--only", default="", help="settings whose line has this in it: nf4, 3 x 1")
    parser.add_argument("--folder", type=Path, help="where models of random weights are kept for the next time")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(*json.loads(options.child))))
        return
    settings = SETTINGS + GPU_SETTINGS if torch.cuda.is_available() else SETTINGS
    if options.seeds:
        settings = tuple(("smollm2", n, 12 // n, 128, 64, False, {}) for n in options.seeds)
    records = []
    with tempfile.TemporaryDirectory() as folder:
        kept = options.folder or Path(folder)
        for name, *rest in settings:
            seeds, batch, tokens, supervised, checkpointing, choices = rest
            what = f"{name}, {seeds} x {batch} rows of {tokens} tokens ({supervised} scored)"
            chosen = [f"{name} {value}" for name, value in choices.items()]
            what = ", ".join([what, *chosen, *(["checkpointing"] if checkpointing else [])])
            if options.only not in what:
                continue
            command = [sys.executable, __file__, "--child", json.dumps([model_folder(name, kept), *rest])]
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
            found = json.loads(output.strip().splitlines()[-1])
            total, measured = Memory(**found["estimate"]).total, found["measured"]
            sizes = f"{total / 2**30:5.2f} GiB estimated, {measured / 2**30:5.2f} measured"
            print(f"{what:62} {sizes}: {total / measured:.2f}", flush=True)
            records.append({"setting": what, **found, "ratio": total / measured})
    if options.out:
        options.out.write_text(json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    main()
