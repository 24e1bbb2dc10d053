"""Read the losses over the steps of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from seedlora.names import FUSED, TRAINED_CONTROLS
from seedlora.records.report import TrainingCurves
from seedlora.utils.plain_data import from_json

#: Points of a curve; longer ones are averaged over equal stretches.
POINTS = 200


def training_curves(run: Path, seeds: Sequence[str], merged: str) -> TrainingCurves:
    """Read losses by adapter: ``[step, loss]`` pairs; training losses averaged to at most :data:`POINTS` points.

    Args:
        run: the folder.
        seeds: labels of all seeds, in their order.
        merged: the label that what was validated as the fused adapter has everywhere else.
    """
    # A pass has a file of its own, named by its seeds, and so has a control.
    order = {name.removeprefix("seed_"): i for i, name in enumerate([*seeds, *TRAINED_CONTROLS])}
    files = sorted(run.glob("metrics*.jsonl"), key=lambda file: order.get(f"{file.stem}-".split("-")[1], -1))
    train: dict[str, list[list[float]]] = {}
    validation: dict[str, list[list[float]]] = {}
    for file in files:
        own_train: dict[str, list[list[float]]] = {}
        own_validation: dict[str, list[list[float]]] = {}
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                entry = from_json(line)
            except ValueError:
                continue  # a crash left it unfinished
            if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
                continue
            for curves, prefix in ((own_train, "train/loss_"), (own_validation, "val/loss_")):
                for key, value in entry.items():
                    if key.startswith(prefix) and isinstance(value, int | float) and math.isfinite(value):
                        curves.setdefault(key.removeprefix(prefix), []).append([entry["step"] + 1, value])
        # A seed that was begun in another stack was trained anew; the last pass's fused adapter holds all seeds.
        train |= own_train
        validation |= {merged if label == FUSED else label: curve for label, curve in own_validation.items()}
    stretch = math.ceil(max((len(curve) for curve in train.values()), default=1) / POINTS)
    return {
        "steps_per_point": stretch,
        "ends": {
            label: {"step": int(curve[-1][0]), "last": curve[-1][1], "lowest": min(loss for _, loss in curve)}
            for label, curve in validation.items()
        },
        "train": {label: _averaged(curve, stretch) for label, curve in train.items()},
        "validation": validation,
    }


def end_of(curve: Sequence[Sequence[float]]) -> float:
    """Return the mean loss over the last tenth of a curve, at least one point."""
    last = curve[-max(1, len(curve) // 10) :]
    return sum(loss for _, loss in last) / len(last)


def _averaged(curve: list[list[float]], stretch: int) -> list[list[float]]:
    """Average a curve over equal stretches; each stands at its last step."""
    if stretch == 1:
        return curve
    parts = [np.array(curve[i : i + stretch]) for i in range(0, len(curve), stretch)]
    return [[float(part[-1, 0]), float(part[:, 1].mean())] for part in parts]
