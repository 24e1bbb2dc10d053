"""Average the replicas from time to time: ``ensemble.scheme local``."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from seedlora.names import OUTER_SEED
from seedlora.run.ensemble import Ensemble
from seedlora.run.ensemble_options import LOCAL
from seedlora.run.fit_state import FitState
from seedlora.training.averaging import OuterStep, averaging_error, mean_weights
from seedlora.training.module import SeedLoRAModule
from seedlora.training.stack_operations import copied, put


class LocalAveraging(pl.Callback):
    """Put the mean of the active replicas' weights into each of them; AdamW's moments stay those of each.

    Factors are averaged, whose product is not the mean of the updates: how far it is from that is logged, as
    ``averaging/error``. With an outer learning rate the mean is a step of an outer optimizer, whose state is part of a
    checkpoint; the control ``outer_seed`` is one replica with it.

    Args:
        ensemble: the run.
        state: of the fit.
    """

    def __init__(self, ensemble: Ensemble, state: FitState) -> None:
        self._options, self._state = ensemble.options, state
        self._steps: frozenset[int] = frozenset()
        self._outer: OuterStep | None = None
        self._restored: dict[str, Any] | None = None

    def setup(self, trainer: pl.Trainer, module: SeedLoRAModule, stage: str) -> None:
        """Forget the fit before."""
        if stage == "fit":
            self._steps, self._outer, self._restored = frozenset(), None, None

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs."""
        outer = self._outer
        return {"outer": None if outer is None else [copied(outer.weights), copied(outer.velocity)]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the outer optimizer where it was."""
        self._restored = state_dict

    def on_train_start(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """Know after which steps to average, and from where the outer optimizer goes."""
        control = self._state.control
        if control != OUTER_SEED and (control is not None or self._options.scheme != LOCAL):
            return
        total = module.fit_settings.total_steps
        assert total is not None
        self._steps = frozenset(self._options.averaging_steps(total, module.options))
        if (rate := self._options.outer_learning_rate) is None:
            return
        first = module.stack.parameters(next(iter(module.replicas)).name)
        self._outer = OuterStep(first, rate=rate)
        if self._restored is not None and self._restored["outer"] is not None:
            put(self._outer.weights, self._restored["outer"][0])
            put(self._outer.velocity, self._restored["outer"][1])

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: SeedLoRAModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average, if this batch ended a step after which it is done. All ranks must call it."""
        within_step = (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch
        if trainer.global_step not in self._steps or within_step:
            return
        # One that is not finite would spoil all.
        module.check_weights()
        names = [replica.name for replica in module.replicas.active]
        if not names:
            return
        before = module.stack.factors(names)
        mean = mean_weights([module.stack.parameters(name) for name in names])
        put(module.stack.parameters(names[0]), mean)
        if len(names) > 1:
            error = averaging_error(before, module.stack.factors(names[:1]))
            for logger in trainer.loggers:
                logger.log_metrics({"averaging/error": error}, step=trainer.global_step - 1)
        weights = mean if self._outer is None else self._outer.take(mean)
        for name in names:
            put(module.stack.parameters(name), weights)
