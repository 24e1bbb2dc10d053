"""``train.py`` as a function, with a run of a second."""

from __future__ import annotations

from seedlora.cli.train import main

SMALL = ["--data.num_train", "16", "--data.num_val", "4", "--data.num_test", "12", "--data.batch_size", "4"]


def train(base_model: str, *options: str) -> int:
    """Run ``train.py`` on a few rows; return its exit code."""
    return main(["--model.base_model", base_model, *SMALL, *options])
