"""Runs of train.py as processes, to be killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: A run of a few seconds with dropout, accumulation and a checkpoint at every step.
OPTIONS = [
    *("--model.dtype", "float32", "--model.lora_dropout", "0.1", "--data.batch_size", "2"),
    *("--trainer.accumulate_grad_batches", "2", "--trainer.max_epochs", "6"),
    *("--ensemble.checkpoint_every_n_steps", "1"),
]


def start(base_model: str, dirpath: Path, *options: str) -> subprocess.Popen[str]:
    """Start a run; later options override earlier ones."""
    command = [sys.executable, str(ROOT / "train.py"), "--model.base_model", base_model, *OPTIONS]
    return subprocess.Popen(
        [*command, "--ensemble.dirpath", str(dirpath), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for its good end; returns what it printed."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def wait_for_step(process: subprocess.Popen[str], dirpath: Path, step: int, *, of: str = "*") -> None:
    """Return as soon as the checkpoint of a step, or a later one, is there; ``of`` names the adapters in training."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        steps = [int(path.stem.removeprefix("step=")) for path in dirpath.glob(f"checkpoints/{of}/step=*.ckpt")]
        if steps and max(steps) >= step:
            return
        time.sleep(0.002)
    process.kill()
    raise AssertionError(f"the run ended before step {step}: {process.communicate()[0]}")
