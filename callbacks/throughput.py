"""How fast a run trains, in its log and its progress bar, and how long it will take."""

from __future__ import annotations

import time
from collections import deque
from datetime import timedelta
from itertools import pairwise
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.throughput import get_available_flops

from seedlora.run.operations import Work, work

#: Optimizer steps after which the rest is foretold; the first is no measure of the others.
_MEASURED = 4


class Throughput(pl.Callback):
    """Log tokens per second over the last micro-batches, all seeds in training and ranks together, padding included.

    After a few steps of a fit it prints once how long the fit will take, validation not counted.

    On a GPU whose peak is known also the model FLOP utilisation. It counts what LoRA needs: 4 operations per frozen
    weight and token, because frozen weights take no gradient, and 6 per adapter weight; the head only where a token is
    scored; attention's own products and recomputation are not counted.

    It also keeps apart what a fit spends its time on, in :attr:`took`: ``starting``, ``training`` with its checkpoints,
    ``validation`` with the merge that is validated, and ``fusing``: writing the adapters, and choosing and merging on
    the validation rows. It must come before the callback that merges.

    Args:
        window: micro-batches of the moving average.
    """

    def __init__(self, window: int = 20) -> None:
        self._phase: tuple[str, float] | None = None
        #: Seconds of the last fit by phase.
        self.took: dict[str, float] = {}
        self._marks: deque[tuple[float, int, float]] = deque(maxlen=window + 1)
        self._work: Work | None = None
        self._peak: int | None = None
        self._announce_at: int | None = None

    @property
    def seconds(self) -> float:
        """Return the median seconds of a micro-batch: one that waits for a compiler is no measure of the others."""
        return median(later - earlier for (earlier, *_), (later, *_) in pairwise(self._marks))

    def enter(self, phase: str | None) -> None:
        """Book the time until now, and begin another phase; ``None`` is the end."""
        now = time.perf_counter()
        if self._phase is not None:
            name, since = self._phase
            self.took[name] = self.took.get(name, 0.0) + now - since
        self._phase = None if phase is None else (phase, now)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin to count."""
        if stage == "fit":
            self._phase, self.took = None, {}
            self.enter("starting")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look up what the device can do."""
        self.enter("training")
        self._marks.clear()
        self._announce_at = None if trainer.fast_dev_run else trainer.global_step + _MEASURED
        self._work = work(pl_module.options)
        self._peak = get_available_flops(trainer.strategy.root_device, pl_module.options.base_dtype)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Book the time of a validation apart: it is none of training's."""
        if self._phase is not None and self._phase[0] == "training":
            self.enter("validation")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin anew."""
        self._marks.clear()
        if self._phase is not None and self._phase[0] == "validation":
            self.enter("training")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Book what follows apart: it is done once, whatever the training took."""
        self.enter("fusing")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self.enter(None)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the speed, from the second micro-batch on."""
        self._marks.append((time.perf_counter(), *pl_module.last_forward))
        elapsed, marks = self._marks[-1][0] - self._marks[0][0], list(self._marks)[1:]
        if not elapsed:
            return
        assert self._work is not None
        tokens, scored = sum(mark[1] for mark in marks), sum(mark[2] for mark in marks)
        # Tensors of the CPU: Lightning would put numbers on the GPU, and wait for it to show them.
        pl_module.log("speed/tokens_per_s", torch.tensor(tokens * trainer.world_size / elapsed), prog_bar=True)
        if self._peak:
            done = self._work.operations(tokens=tokens, scored=scored)
            pl_module.log("speed/mfu", torch.tensor(done / elapsed / self._peak), prog_bar=True)
        self._announce(trainer, pl_module)

    def _announce(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print, once, what is left of this fit."""
        if self._announce_at is None or trainer.global_step < self._announce_at:
            return
        self._announce_at, bar = None, trainer.progress_bar_callback
        left = (pl_module.fit_settings.total_steps or 0) - trainer.global_step
        if left > 0 and bar is not None and trainer.is_global_zero:
            seconds = self.seconds * trainer.accumulate_grad_batches
            names = ", ".join(replica.name for replica in pl_module.replicas)
            total = timedelta(seconds=round(seconds * left))
            bar.print(f"{seconds:.3g} s a step: about {total} (h:mm:ss) to train {names}, {left:,} steps from here")
