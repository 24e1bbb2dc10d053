"""Keep an exponential mean of each replica's weights beside it: ``ensemble.ema``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from seedlora.run.ensemble import Ensemble
from seedlora.training.module import SeedLoRAModule
from seedlora.training.stack_operations import copied, holding, move_mean


class ExponentialMeans(pl.Callback):
    """Take the weights of the active replicas into their means after each optimizer step.

    Who is stopped has its mean up to then. The means are part of a checkpoint.

    Args:
        ensemble: the run, which says the decay: that of a part of the run is longer for a control that trains longer.
    """

    def __init__(self, ensemble: Ensemble) -> None:
        self._options = ensemble.options
        self._decay: float | None = None
        self._step = 0
        self._means: dict[str, list[Tensor]] = {}
        self._taken: dict[str, int] = {}

    def setup(self, trainer: pl.Trainer, module: SeedLoRAModule, stage: str) -> None:
        """Forget the fit before."""
        if stage == "fit":
            self._step, self._means, self._taken = 0, {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs."""
        return {"means": {name: copied(mean) for name, mean in self._means.items()}, "taken": self._taken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the means where they were."""
        self._means, self._taken = state_dict["means"], state_dict["taken"]

    def on_train_start(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """Know the decay, and which steps were taken before."""
        self._step, total = trainer.global_step, module.fit_settings.total_steps
        self._decay = None if total is None or trainer.fast_dev_run else self._options.ema_decay(total)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: SeedLoRAModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the means, if this batch ended an optimizer step."""
        if self._decay is None or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        for replica in (replica for replica in module.replicas.active if not replica.helps):
            weights = [parameter.detach() for parameter in module.stack.parameters(replica.name)]
            mean = self._means.get(replica.name) or [weight.clone() for weight in weights]
            # Those of a checkpoint are on the CPU.
            self._means[replica.name] = mean = [m.to(w.device) for m, w in zip(mean, weights, strict=True)]
            self._taken[replica.name] = self._taken.get(replica.name, 0) + 1
            move_mean(mean, weights, decay=self._decay, step=self._taken[replica.name])

    @contextmanager
    def in_place(self, module: SeedLoRAModule, name: str) -> Iterator[bool]:
        """Have a replica hold its mean inside, if it has one; say whether it does."""
        if name not in self._means:
            yield False
            return
        with holding(module.stack.parameters(name), self._means[name]):
            yield True
