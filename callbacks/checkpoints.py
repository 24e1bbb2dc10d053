"""Save checkpoints of a fit."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from seedlora.distributed.lightning_internals import validates_after_batch
from seedlora.run.ensemble import Ensemble
from seedlora.run.fit_state import FitState
from seedlora.training.module import SeedLoRAModule
from seedlora.training.replicas import StoppedError


class Checkpoints(pl.Callback):
    """Save a checkpoint every so many optimizer steps, and after a SIGTERM, which ends the run.

    One that is due together with a validation, or with the end of an epoch, waits for it: a resume would not make up
    for it. When the adapters are written the checkpoints are removed.

    Args:
        ensemble: the run.
        state: of the fit.
    """

    def __init__(self, ensemble: Ensemble, state: FitState) -> None:
        self._ensemble, self._state = ensemble, state
        self._is_due = self._ends_run = False

    def setup(self, trainer: pl.Trainer, module: SeedLoRAModule, stage: str) -> None:
        """Forget the fit before."""
        self._is_due = self._ends_run = False

    def on_train_start(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """Write down who is trained together, for whoever resumes before the first checkpoint."""
        if trainer.is_global_zero and not trainer.fast_dev_run:
            self._ensemble.folder.begin(_names(module))

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: SeedLoRAModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save a checkpoint if one is due, or let it wait for the validation.

        Raises:
            StoppedError: after a SIGTERM, when the checkpoint is written.
        """
        step = trainer.global_step
        within_step = (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch
        if within_step or trainer.fast_dev_run or self._state.share.has_all_steps(step):
            return
        terminated = trainer.strategy.reduce_boolean_decision(self._state.terminated, all=False)
        if not terminated and step % self._ensemble.options.checkpoint_every_n_steps:
            return
        self._is_due, self._ends_run = True, terminated
        if not (trainer.is_last_batch or validates_after_batch(trainer)):
            self._save(trainer, module)

    def on_validation_end(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """Save the checkpoint that was due, unless the end of the epoch is too; raises as the hook above."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.is_last_batch:
            self._save(trainer, module)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """Save the checkpoint that was due, unless training is over; raises as the hooks above."""
        if not self._state.share.has_all_epochs(trainer.current_epoch + 1):
            self._save(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """Remove the checkpoints, once every rank has written its part of the adapters."""
        if trainer.fast_dev_run:
            return
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            self._ensemble.folder.forget_checkpoints(_names(module))

    def _save(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """Save the checkpoint that is due, if one is, and leave if that was asked for. All ranks must call it.

        It is saved beside the one before, and then takes its place.
        """
        if not self._is_due:
            return
        self._is_due, folder = False, self._ensemble.folder
        with folder.new_checkpoint(_names(module), trainer.global_step) as temporary:
            trainer.save_checkpoint(temporary)
        if trainer.is_global_zero:
            folder.keep(temporary)
        trainer.strategy.barrier()
        if self._ends_run:
            raise StoppedError(f"terminated by SIGTERM; step {trainer.global_step} is saved")


def _names(module: SeedLoRAModule) -> list[str]:
    return [replica.name for replica in module.replicas]
