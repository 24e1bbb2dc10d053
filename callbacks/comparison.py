"""Score all adapters of a run on the test items, and compare them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl

from seedlora.adapters.adapter import is_trained
from seedlora.adapters.model_card import refresh_card
from seedlora.callbacks.scored_batches import load_adapters, score_loaded, scorer, tested_batches, train_sample
from seedlora.callbacks.tested_rows import TestedRows
from seedlora.merge.registry import make_rule
from seedlora.names import BASE, LOGITS, SOUP
from seedlora.records.results import RESULTS
from seedlora.run.ensemble import Ensemble
from seedlora.run.outcome import Outcome
from seedlora.scores.row_scores import RowScores
from seedlora.selection.choice import score_lazily
from seedlora.training.module import SeedLoRAModule
from seedlora.training.scoring import ADAPTERS_PER_FORWARD, ScoredLabels
from seedlora.training.whole_models import WholeModels
from seedlora.updates.stacks import Layers


class ComparisonOnTest(pl.Callback):
    """Score base, seeds, soup and fused adapter on the test items, then what else is compared, also on training rows.

    Args:
        ensemble: the run, which gets the results.
        tested_rows: gets what is compared takes for the answers.
    """

    def __init__(self, ensemble: Ensemble, tested_rows: TestedRows) -> None:
        self._ensemble, self._tested_rows = ensemble, tested_rows

    def on_test_start(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """Read the adapters back from their folders."""
        self.load(module)

    def load(self, module: SeedLoRAModule) -> None:
        """Have the module score what the test's own pass scores: of whole models the base alone, the others later."""
        module.scored = ScoredLabels({BASE: None})
        if module.options.is_full_finetuning:
            return
        adapters, mixtures = self._ensemble.read_tested(module.device), {}
        load_adapters(module.stack, adapters)
        if self._ensemble.comparison.has_controls and len(self._ensemble.trained) > 1:
            mixtures = {LOGITS: self._ensemble.trained}
        module.scored = ScoredLabels({BASE: None, **{label: label for label in adapters}}, mixtures)

    def on_test_end(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """Score what else is compared, and all on some training rows; compare and write ``results.json``."""
        ensemble, tested = self._ensemble, module.exact_matches.rows()
        outcome = Outcome.of_test(module.scored.labels, tested.correct, tested.items)
        sample = train_sample(trainer, len(outcome.items))
        if sample:
            outcome.train = score_loaded(trainer, module, sample)
        outcome.add(self._score_beside(trainer, module, outcome.numbered_after(sample)))
        ensemble.results = outcome.results(ensemble.trained)
        if trainer.is_global_zero and not trainer.fast_dev_run:
            record = outcome.record(ensemble.results, trainer.datamodule)
            if ensemble.excluded:
                record["left_out"] = ensemble.excluded
            RESULTS.write(ensemble.dirpath, record)
            if is_trained(ensemble.fused_path):
                refresh_card(ensemble.fused_path)

    def _score_beside(self, trainer: pl.Trainer, module: SeedLoRAModule, more: Sequence[Any]) -> dict[str, RowScores]:
        """Score what is not in the test's own pass, on its batches and then on ``more``. All ranks must call it."""
        whole = module.options.is_full_finetuning
        beside = self._whole_models(module) if whole else self._ensemble.beside(module.device)
        if not beside:
            return {}
        batches = [*tested_batches(trainer), *more]
        title, keep = "Scoring what is compared", partial(self._tested_rows.add, module.tokenizer)
        with scorer(trainer, module, batches, title, adapters=len(beside), on_scores=keep) as score:
            return score_lazily(beside, score, at_once=1 if whole else ADAPTERS_PER_FORWARD)

    def _whole_models(self, module: SeedLoRAModule) -> dict[str, Callable[[], Layers]]:
        """Return the whole models to be scored, by label: seeds, soup, what is compared, and the fused one; read when
        called.
        """
        ensemble, trained = self._ensemble, self._ensemble.trained
        models = WholeModels(module.stack, module.options)
        made: dict[str, Callable[[], Layers]] = {}
        made |= {label: partial(models.read, folder) for label, folder in ensemble.folders.items()}
        fused = partial(models.merge, module.trainer, [ensemble.adapter_path(name) for name in trained])
        if len(trained) > 1:
            if SOUP not in made and (ensemble.rule is not None or ensemble.comparison.compare):
                made[SOUP] = partial(fused, make_rule(SOUP))
            made |= {name: partial(fused, rule) for name, rule in ensemble.compared.compare.items() if rule is not None}
        return made
