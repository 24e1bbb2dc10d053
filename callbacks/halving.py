"""Drop the worse half of the replicas at some parts of a run: ``ensemble.halving``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from seedlora.distributed.lightning_internals import validate_after_steps
from seedlora.run.ensemble import Ensemble
from seedlora.run.fit_state import Drop, FitState
from seedlora.run.halving import HalvingRound, halve
from seedlora.scores.intervals import is_finite, loss_difference
from seedlora.scores.row_scores import RowScores
from seedlora.scores.wording import LOSS_CHANGE
from seedlora.training.module import SeedLoRAModule
from seedlora.training.scoring import BatchScores, rows_of_batch
from seedlora.utils.say import say


class Halving(pl.Callback):
    """Have the replicas validated after the steps of a halving, and leave out those with the higher losses there.

    Who is left out trains no more, as one that diverged: its rows are not in the forward, and it is neither written nor
    merged. One that was stopped by ``patience`` takes part, with its loss of then. All ranks have the same losses.

    Args:
        ensemble: the run.
        state: of the fit.
    """

    def __init__(self, ensemble: Ensemble, state: FitState) -> None:
        self._options, self._state = ensemble.options, state
        self._rounds: tuple[HalvingRound, ...] = ()
        self._done = 0
        #: Of the validation at hand, where it is that of a halving.
        self._rows: list[Tensor] = []

    def setup(self, trainer: pl.Trainer, module: SeedLoRAModule, stage: str) -> None:
        """Forget the fit before."""
        if stage == "fit":
            self._rounds, self._done, self._rows = (), 0, []

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs, beside who is left out."""
        return {"halvings": self._done, "dropped": {name: tuple(drop) for name, drop in self._state.dropped.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the halvings where they were."""
        self._done = state_dict["halvings"]
        self._state.dropped = {name: Drop(*drop) for name, drop in state_dict["dropped"].items()}

    def on_train_start(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """Know the steps, and have them end with a validation."""
        if self._state.control is not None or trainer.fast_dev_run:
            return
        assert module.fit_settings.total_steps is not None
        self._rounds = self._options.halving_rounds(module.fit_settings.total_steps)
        validate_after_steps(trainer, {one.step for one in self._rounds})

    def _is_due(self, trainer: pl.Trainer) -> bool:
        """Tell whether the validation at hand is that of a halving."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or self._done == len(self._rounds):
            return False
        return trainer.global_step >= self._rounds[self._done].step

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        module: SeedLoRAModule,
        outputs: dict[str, Tensor] | None,
        batch: Mapping[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the losses of the rows, which say how sure a difference is."""
        if outputs is not None and self._is_due(trainer):
            self._rows.append(rows_of_batch(batch, BatchScores(**outputs)))

    def on_validation_end(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """Leave out the worse half, if this validation is that of a halving. All ranks must call it."""
        if not self._is_due(trainer):
            return
        self._done += 1
        names = [replica.name for replica in module.replicas if replica.name not in module.replicas.left_out]
        losses = {name: float(trainer.callback_metrics[f"val/loss_{name}"]) for name in names}
        rows = module.scorer.all_rows(self._rows, module.scored.labels) if self._rows else {}
        self._rows, halved, step = [], halve(losses), trainer.global_step
        reasons = {
            name: (
                f"its validation loss after step {step:,} was {losses[name]:.4f}, in the worse half of {len(names)}"
                f"{_noise(rows, name, halved.kept[-1])}"
            )
            for name in halved.dropped
        }
        self._state.dropped |= {name: Drop(step, losses[name]) for name in halved.dropped}
        module.replicas.leave_out(reasons)
        if reasons and trainer.is_global_zero:
            left = [name for name in names if name not in reasons]
            say(f"Halving after step {step:,}: {', '.join(left)} of {len(names)} replicas go on.")
        if not module.replicas.active:
            trainer.should_stop = True

    def teardown(self, trainer: pl.Trainer, module: SeedLoRAModule, stage: str) -> None:
        """Give the Trainer its own validations back."""
        validate_after_steps(trainer, ())

    def on_exception(self, trainer: pl.Trainer, module: SeedLoRAModule, exception: BaseException) -> None:
        """Do the same where the fit ends in an error."""
        validate_after_steps(trainer, ())


def _noise(rows: Mapping[str, RowScores], dropped: str, kept: str) -> str:
    """Say whether a replica is shown to be worse than the last one that went on; empty where that cannot be said."""
    if dropped not in rows or not (is_finite(rows[dropped]) and is_finite(rows[kept])):
        return ""
    found = loss_difference(rows[dropped], rows[kept])
    shown = "" if found["shown"] else "not "
    number = LOSS_CHANGE.with_interval(found["value"], found["low"], found["high"])
    return f"; on {found['n']:,} rows it is {shown}shown to be worse than {kept}, the last that went on: {number}"
