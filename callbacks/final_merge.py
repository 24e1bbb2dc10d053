"""Merge the seeds when all are trained."""

from __future__ import annotations

import lightning.pytorch as pl

from seedlora.callbacks.scored_batches import load_adapters, scorer, validation_batches
from seedlora.merge.bound_rule import BoundRule
from seedlora.merge.inputs import stack_adapters
from seedlora.names import BASE
from seedlora.records.selection import SELECTION
from seedlora.run.ensemble import Ensemble
from seedlora.run.fit_state import FitState
from seedlora.run.merging import merge_run
from seedlora.selection.settling import adapters_to_score, settle
from seedlora.training.module import SeedLoRAModule
from seedlora.training.scoring import ScoredLabels


class FinalMerge(pl.Callback):
    """Choose on the validation rows what is to be chosen, and merge: after the last seed, and in ``Trainer.validate``.

    Args:
        ensemble: the run.
        state: of the fit.
    """

    def __init__(self, ensemble: Ensemble, state: FitState) -> None:
        self._ensemble, self._state = ensemble, state

    def on_validation_start(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """Read the seeds that ``Trainer.validate`` scores; whole models are read one by one, later."""
        if trainer.state.fn != "validate":
            return
        if module.options.is_full_finetuning:
            module.scored = ScoredLabels({BASE: None})
            return
        seeds = self._ensemble.read_seeds()
        load_adapters(module.stack, seeds)
        module.scored = ScoredLabels({label: label for label in seeds})

    def on_validation_end(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """Merge what ``Trainer.validate`` has scored."""
        if trainer.state.fn == "validate":
            self._merge(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """Merge the seeds if these were the last."""
        if trainer.fast_dev_run:
            return
        if self._state.control is None:
            self._merge(trainer, module)
        trainer.strategy.barrier()

    def _merge(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """Choose and merge, once all seeds are there. All ranks must call it."""
        ensemble = self._ensemble
        if ensemble.pending or not ensemble.trained or trainer.fast_dev_run:
            return
        batches = [] if ensemble.rule is None else validation_batches(trainer)
        rule = self._choose(trainer, module, batches) if batches and not module.options.adds_dense else None
        if trainer.is_global_zero:
            merge_run(ensemble, rule)

    def _choose(self, trainer: pl.Trainer, module: SeedLoRAModule, batches: list[object]) -> BoundRule:
        """Choose the rule, and write down what the validation rows say. All ranks must call it."""
        comparison, adapters = self._ensemble.compared, self._ensemble.read_seeds()
        stacks = stack_adapters(adapters, device=module.device)
        means = self._ensemble.means(module.device)
        most = adapters_to_score(comparison, list(stacks), len(adapters)) + len(means)
        with scorer(trainer, module, batches, "Scoring on validation rows", adapters=most) as score:
            settled = settle(comparison, stacks, list(adapters), score, others=means)
        if trainer.is_global_zero:
            SELECTION.write(self._ensemble.dirpath, settled.selection)
        return settled.rule
