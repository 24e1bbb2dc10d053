"""The memory estimate of the plan against the measured peak of a training step, each setting in its own process.

    python benchmarks/memory.py
    python benchmarks/memory.py --seeds 1 3 6        # how the peak grows with the seeds in the stack

Prints estimate, measured peak beside what the process held before the model was loaded, and their ratio.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

import train as speed  # benchmarks/train.py, which is beside this file
from callbacks import SeedEnsembleCallback
from seedlora.base_model import EMBEDDED, fast_dtype, outline
from seedlora.module import SeedLoRAModule
from seedlora.plan import Memory, PeakMemory, attention_scores, memory_estimate, trainable_parameters

#: model, seeds, rows of each, tokens of a row, supervised tokens of a row, gradient checkpointing
SETTINGS = (
    ("smollm2", 3, 8, 29, 4, False),
    ("smollm2", 1, 4, 256, 128, False),
    ("smollm2", 1, 4, 512, 256, True),
    ("llama6", 3, 4, 256, 64, False),
    ("llama6", 3, 2, 512, 512, False),
    ("wide4", 2, 4, 300, 50, False),
)
SHAPES = {"llama6": (512, 1408, 6, 49152), "wide4": (1024, 2816, 4, 40960)}


def model_folder(name: str, root: Path) -> str:
    """The embedded model, or a random Llama of another shape."""
    if name == "smollm2":
        return EMBEDDED
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, ffn, layers, vocabulary = SHAPES[name]
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64}
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, **heads
    )
    LlamaForCausalLM(config).to(fast_dtype()).save_pretrained(root / name)
    return str(root / name)


def measure(model: str, seeds: int, batch: int, tokens: int, supervised: int, checkpointing: bool) -> dict[str, Any]:
    """Estimate and peak of three steps, in bytes."""
    module = SeedLoRAModule(model, r=8, lr_scheduler="constant", gradient_checkpointing=checkpointing)
    shape = outline(model)
    estimate = memory_estimate(
        base_parameters=shape.parameters,
        base_bytes=module.dtype_base.itemsize,
        trainable=seeds * trainable_parameters(module),
        tokens=seeds * batch * tokens,
        supervised=seeds * batch * supervised,
        layers=shape.config.num_hidden_layers,
        hidden=shape.config.hidden_size,
        intermediate=shape.config.intermediate_size,
        vocabulary=shape.config.vocab_size,
        scores=attention_scores(module, tokens),
        checkpointing=checkpointing,
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
            callbacks=[ensemble],
        )
        import peft  # noqa: F401 - what importing takes is not the run's
        import transformers  # noqa: F401

        peak = PeakMemory(trainer.strategy.root_device)
        trainer.fit(module, datamodule=speed.StackedRows("here", batch, 3))
        measured = peak.bytes
    return {"estimate": asdict(estimate), "measured": measured}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of the settings: SmolLM2 with 12 rows in all")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(*json.loads(options.child))))
        return
    settings = SETTINGS if not options.seeds else tuple(("smollm2", n, 12 // n, 128, 64, False) for n in options.seeds)
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for name, *rest in settings:
            command = [sys.executable, __file__, "--child", json.dumps([model_folder(name, Path(folder)), *rest])]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found = json.loads(output.strip().splitlines()[-1])
            total, measured = Memory(**found["estimate"]).total, found["measured"]
            seeds, batch, tokens, supervised, checkpointing = rest
            what = f"{name}, {seeds} x {batch} rows of {tokens} tokens ({supervised} scored)"
            what += ", checkpointing" if checkpointing else ""
            sizes = f"{total / 2**30:5.2f} GiB estimated, {measured / 2**30:5.2f} measured"
            print(f"{what:62} {sizes}: {total / measured:.2f}", flush=True)
            records.append({"setting": what, **found, "ratio": total / measured})
    if options.out:
        options.out.write_text(json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    main()
