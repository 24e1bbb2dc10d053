"""Find each task's floor: the length of training, in epochs, at which one seed has its lowest validation loss.

One seed that no cell has is trained for each of several lengths, each with its own schedule, at each of several
learning rates, side by side in one stack. The rate and the length of the lowest validation loss are those of the cells.
"""

from __future__ import annotations

from benchmarks.study.design import EPOCHS, RATES, SCOUT, Task
from benchmarks.study.training import CURVES, Run, Setting, train
from seedlora.records.json_file import JSONFile

#: By task: epochs, rate, and the validation losses by rate and epochs.
FLOORS = JSONFile("floors.json", dict[str, dict[str, object]])


def find_floor(setting: Setting, label: str, task: Task) -> dict[str, object]:
    """Train the scout and return the length, in epochs, and the rate of its lowest validation loss."""
    losses = {f"{rate:g}": {} for rate in RATES}
    for epochs in EPOCHS:
        options = {"sweep": {"learning_rate": list(RATES)}, "merge": "none"}
        run = Run(f"floor_{label}_{epochs}", task, (SCOUT,), epochs, RATES[0], options)
        ensemble = train(setting, run)
        curves = CURVES.read(ensemble.dirpath) or {}
        for rate, replica in zip(RATES, ensemble.ensemble.replicas, strict=True):
            losses[f"{rate:g}"][str(epochs)] = curves[replica.name][-1][1]
    best = min(((loss, rate, epochs) for rate, row in losses.items() for epochs, loss in row.items()))
    return {"epochs": int(best[2]), "rate": float(best[1]), "loss": best[0], "losses": losses}
