"""Say who is trained in a fit, and for how long."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from seedlora.run.budget import replica_share, replica_steps
from seedlora.run.ensemble import Ensemble
from seedlora.run.fit_state import FitState
from seedlora.run.trainer_options import ended_by
from seedlora.training.module import SeedLoRAModule
from seedlora.training.replicas import FitSettings, StoppedError


class Assignment(pl.Callback):
    """Give module and data module the replicas of a fit, and end it when these have had their share.

    Args:
        ensemble: the run.
        state: of the fit, which begins here.
    """

    def __init__(self, ensemble: Ensemble, state: FitState) -> None:
        self._ensemble, self._state = ensemble, state

    def setup(self, trainer: pl.Trainer, module: SeedLoRAModule, stage: str) -> None:
        """Fix the replicas and their share of the trainer's epochs or steps.

        Raises:
            ValueError: if the limits of the trainer cannot be shared.
        """
        if stage != "fit":
            return
        ensemble, data = self._ensemble, trainer.datamodule
        control = ensemble.next_control
        self._state.begin(control, replica_share(ensemble.options, trainer, control=control))
        replicas = ensemble.next_replicas
        data.seeds = tuple(replica.order_seed for replica in replicas)
        settings = FitSettings(
            replicas,
            total_steps=replica_steps(self._state.share, trainer, data),
            rank_factor=ensemble.next_rank_factor,
            on_divergence=ensemble.options.on_divergence,
        )
        module.prepare_fit(settings)

    def on_train_start(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """Note that training began."""
        self._state.began = True

    def on_fit_end(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """End the run if this fit has trained nothing: the next one would not either.

        Raises:
            StoppedError: naming what kept it from training.
        """
        if not self._state.began:
            raise StoppedError(f"nothing was trained: {ended_by(trainer)} ended the fit before its first step")

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: SeedLoRAModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop when the replicas have had their steps."""
        if self._state.share.has_all_steps(trainer.global_step):
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """Stop when the replicas have had their epochs."""
        if self._state.share.has_all_epochs(trainer.current_epoch + 1):
            trainer.should_stop = True
