"""Merge the seeds at every validation of a fit."""

from __future__ import annotations

import lightning.pytorch as pl

from seedlora.run.ensemble import Ensemble
from seedlora.run.fit_state import FitState
from seedlora.training.live_updates import load_updates, read_updates
from seedlora.training.module import SeedLoRAModule
from seedlora.training.scoring import ScoredLabels


class LiveMerge(pl.Callback):
    """Have the seeds of the fit validated side by side, and their merge with those already finished beside them.

    Nothing random is drawn and no weight is changed. What the last step spoiled is left out.

    Args:
        ensemble: the run.
        state: of the fit.
    """

    def __init__(self, ensemble: Ensemble, state: FitState) -> None:
        self._ensemble, self._state = ensemble, state

    def setup(self, trainer: pl.Trainer, module: SeedLoRAModule, stage: str) -> None:
        """Say what is validated."""
        if stage == "fit":
            module.scored = self._validated(module)

    def on_validation_start(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """Merge the seeds as they are now."""
        if trainer.state.fn == "validate":
            return
        module.check_weights()
        module.scored = self._validated(module)
        label = self._label
        if label is None or label not in module.scored.adapters:
            return
        stack = [replica.name for replica in module.replicas]
        names = self._names(module)
        updates = read_updates(module.stack, names)
        load_updates(module.stack, label, self._ensemble.merge_live(updates, names, stack=stack))

    @property
    def _label(self) -> str | None:
        """Return the label of what is merged; None while a control is trained."""
        return self._ensemble.live_label if self._state.control is None else None

    @staticmethod
    def _names(module: SeedLoRAModule) -> list[str]:
        """Return the replicas that are validated."""
        left_out = module.replicas.left_out
        return [replica.name for replica in module.replicas if not replica.helps and replica.name not in left_out]

    def _validated(self, module: SeedLoRAModule) -> ScoredLabels:
        """Return the labels of what is validated, and the adapters that they stand for."""
        names = self._names(module)
        # What DoRA and whole models add to a weight has full rank: merging it takes longer than training.
        fused = [self._label] if self._label and names and not module.options.adds_dense else []
        return ScoredLabels({name: name for name in (*names, *fused)})
