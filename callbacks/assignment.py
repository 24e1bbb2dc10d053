"""Say who is trained in a fit, and for how long."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from seedlora.datamodules.sampler import Growth
from seedlora.distributed.lightning_internals import share_limits
from seedlora.names import WIDE_BATCHES
from seedlora.run.budget import replica_share, replica_steps, steps_per_epoch
from seedlora.run.ensemble import Ensemble
from seedlora.run.fit_state import FitState
from seedlora.run.stack_data import GrowsRows
from seedlora.run.trainer_options import ended_by
from seedlora.training.module import SeedLoRAModule
from seedlora.training.replicas import FitSettings, StoppedError


class Assignment(pl.Callback):
    """Give module and data module the replicas of a fit, and end it when these have had their share.

    During the fit the Trainer's ``max_epochs`` and ``max_steps`` are that share, so that its progress bar counts to it.

    Args:
        ensemble: the run.
        state: of the fit, which begins here.
    """

    def __init__(self, ensemble: Ensemble, state: FitState) -> None:
        self._ensemble, self._state = ensemble, state
        #: The Trainer's own ``max_epochs`` and ``max_steps``, while a fit has others.
        self._given: tuple[int | None, int] | None = None

    def setup(self, trainer: pl.Trainer, module: SeedLoRAModule, stage: str) -> None:
        """Fix the replicas and their share of the trainer's epochs or steps.

        Raises:
            ValueError: if the limits of the trainer cannot be shared.
        """
        if stage != "fit":
            return
        ensemble, data = self._ensemble, trainer.datamodule
        control = ensemble.next_control
        if isinstance(data, GrowsRows):
            data.growth = None
        self._state.begin(control, replica_share(ensemble.options, trainer, control=control))
        replicas = ensemble.next_replicas
        data.seeds = tuple(replica.order_seed for replica in replicas)
        steps = replica_steps(self._state.share, trainer, data)
        settings = FitSettings(
            replicas,
            total_steps=steps,
            shared_steps=ensemble.options.shared_steps(steps, control),
            # A rate that is too high for a wide batch is left out, and the others are tried.
            on_divergence="exclude" if control in WIDE_BATCHES else ensemble.options.on_divergence,
        )
        if control is None and not trainer.fast_dev_run:
            rounds = [one for one in ensemble.options.halving_rounds(steps) if one.times > 1]
            if rounds:
                per_epoch = steps_per_epoch(trainer, data.train_dataloader())
                data.growth = Growth([one.step for one in rounds], [one.times for one in rounds], per_epoch)
        module.prepare_fit(settings)
        share, self._given = self._state.share, (trainer.max_epochs, trainer.max_steps)
        share_limits(
            trainer,
            max_epochs=trainer.max_epochs if share.epochs is None else share.epochs,
            max_steps=trainer.max_steps if share.steps is None else share.steps,
        )

    def teardown(self, trainer: pl.Trainer, module: SeedLoRAModule, stage: str) -> None:
        """Give the Trainer its own limits back."""
        self._give_back(trainer)

    def on_exception(self, trainer: pl.Trainer, module: SeedLoRAModule, exception: BaseException) -> None:
        """Do the same where the fit ends in an error."""
        self._give_back(trainer)

    def _give_back(self, trainer: pl.Trainer) -> None:
        if self._given is not None:
            share_limits(trainer, max_epochs=self._given[0], max_steps=self._given[1])
            self._given = None

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
