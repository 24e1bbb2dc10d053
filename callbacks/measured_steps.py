"""Time and memory of a few steps, for a plan."""

from __future__ import annotations

import time
from itertools import pairwise
from statistics import median
from typing import Any

import lightning.pytorch as pl

from seedlora.run.cost import PeakMemory


class MeasuredSteps(pl.Callback):
    """Time the micro-batches of a fit, and end it when the next would last beyond a limit.

    Loading is no part of the memory: while files are read, their pages count that can be dropped at any time.

    Args:
        peak: of the memory.
        until: when to end, by the monotonic clock; one micro-batch is always done.
    """

    def __init__(self, peak: PeakMemory, until: float) -> None:
        self._peak, self._until = peak, until
        self._ends: list[float] = []

    @property
    def seconds(self) -> float:
        """Return the median seconds of a micro-batch, without the first one if there are others."""
        taken = [later - earlier for earlier, later in pairwise(self._ends)]
        return median(taken[1:] or taken)

    @property
    def peak_bytes(self) -> int:
        """Return the most memory that was held."""
        return self._peak.bytes

    @property
    def micro_batches(self) -> int:
        """Return how many were measured."""
        return len(self._ends) - 1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin."""
        self._peak.forget()
        self._ends = [time.monotonic()]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the time, and end if there is not enough left for as much again."""
        self._ends.append(time.monotonic())
        if self._ends[-1] + self.seconds > self._until:
            trainer.should_stop = True
