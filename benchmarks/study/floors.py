"""Find each task's floor: the length of training, in epochs, at which one seed has its lowest validation loss.

One seed that no cell has is trained for each of several lengths, each with its own schedule, at each of several
learning rates, side by side in one stack. The rate and the length of the lowest validation loss are those of the cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.study.design import EPOCHS, SCOUT, Task
from benchmarks.study.training import Run, Setting, train
from seedlora.records.training import TRAINED


def find_floor(setting: Setting, label: str, task: Task, *, rates: Sequence[float]) -> dict[str, Any]:
    """Train the scout and return the length, in epochs, and the rate of its lowest validation loss."""
    losses: dict[str, dict[str, float]] = {f"{rate:g}": {} for rate in rates}
    for epochs in EPOCHS:
        options = {"sweep": {"learning_rate": list(rates)}, "merge": "none"}
        run = Run(f"floor_{label}_{epochs}", task, (SCOUT,), epochs, rates[0], options)
        ensemble = train(setting, run)
        trained = TRAINED.read(ensemble.dirpath) or {}
        for rate, replica in zip(rates, ensemble.ensemble.replicas, strict=True):
            losses[f"{rate:g}"][str(epochs)] = round(trained[replica.name]["validation_loss"], 6)
    loss, rate, epochs = min((loss, rate, epochs) for rate, row in losses.items() for epochs, loss in row.items())
    return {"epochs": int(epochs), "rate": float(rate), "loss": loss, "losses": losses}
