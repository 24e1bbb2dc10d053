"""Make tiny runs of ``train.py`` in forked processes: the base model, the options, and what a run leaves to compare."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.reliability.children import Ended, run_command
from seedlora.cli.train import main
from tests.helpers.models import save_tiny_llama
from tests.helpers.paths import ROOT

#: A run of two seeds, one after the other, of 20 steps in all, with a checkpoint every other step, and two merges.
SMALL = [
    *("--model.dtype", "float32", "--model.r", "2", "--model.lora_dropout", "0.1", "--ensemble.seeds", "[1,2]"),
    *("--ensemble.stack_size", "1", "--ensemble.budget", "full", "--ensemble.checkpoint_every_n_steps", "2"),
    *("--ensemble.compare", "ties", "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"),
    *("--trainer.enable_progress_bar", "false", "--trainer.accumulate_grad_batches", "2"),
    *("--data.num_train", "40", "--data.num_val", "4", "--data.num_test", "6", "--data.batch_size", "2"),
]


def make_base(folder: Path) -> str:
    """Save the base model; return its folder."""
    save_tiny_llama(folder, seed=0, hidden_size=16, intermediate_size=24)
    return str(folder)


def words_of(base: str, run: str | Path, *more: str) -> list[str]:
    """Return the words of a tiny run; later ones override earlier ones."""
    return ["--model.base_model", base, *SMALL, "--ensemble.dirpath", str(run), *more]


def train(words: Sequence[str], *, cwd: Path) -> Ended:
    """Run ``train.py`` in a forked process."""
    return run_command(start_as_script, words, cwd=cwd)


def start_as_script(words: Sequence[str]) -> int:
    """Run ``train.py`` in this process, so that Lightning starts other ranks as it does for a user."""
    sys.argv = [str(ROOT / "train.py"), *words]
    sys.modules["__main__"].__spec__ = None
    return main(words)


def products(run: Path) -> dict[str, str]:
    """Return hashes of what a finished run made: weights, and the scores in ``results.json``."""
    found = {}
    for file in sorted(run.glob("*/adapter_model.safetensors")):
        found[str(file.relative_to(run))] = hashlib.sha256(file.read_bytes()).hexdigest()
    results = run / "results.json"
    if results.is_file():
        scores: Any = json.loads(results.read_text(encoding="utf-8"))
        found["results.json"] = hashlib.sha256(json.dumps(scores, sort_keys=True).encode()).hexdigest()
    return found
