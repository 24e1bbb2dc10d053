"""Score adapters on batches of validation, test and training rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from rich.progress import Progress, TaskProgressColumn, TimeRemainingColumn
from torch import Tensor

from seedlora.adapters.adapter import Adapter
from seedlora.adapters.stack import AdapterStack
from seedlora.run.budget import limited_batches
from seedlora.run.stack_data import HasTrainSample, Loader
from seedlora.scores.row_scores import RowScores
from seedlora.selection.choice import Score
from seedlora.selection.comparison import TRAIN_ROWS
from seedlora.training.module import SeedLoRAModule
from seedlora.training.scoring import BatchScores, OnScores, keep_nothing
from seedlora.utils.progress import progress_bar


def validation_batches(trainer: pl.Trainer) -> list[Any]:
    """Return the validation batches of this rank, as many as the trainer validates on."""
    return _taken(trainer.datamodule.val_dataloader(), trainer.limit_val_batches)


def tested_batches(trainer: pl.Trainer) -> list[Any]:
    """Return the batches of this rank that the trainer has just tested on."""
    return _taken(trainer.test_dataloaders, trainer.limit_test_batches)


def train_sample(trainer: pl.Trainer, n: int) -> list[Any]:
    """Return this rank's batches of some training rows, at most ``n``; none if the data module gives none."""
    data = trainer.datamodule
    return list(data.train_sample(min(n, TRAIN_ROWS))) if isinstance(data, HasTrainSample) else []


def load_adapters(stack: AdapterStack, adapters: Mapping[str, Adapter]) -> None:
    """Put adapters beside those in training, to be scored under their labels."""
    for label, adapter in adapters.items():
        stack.load(label, adapter.layers, magnitudes=adapter.magnitudes, modules=adapter.modules)


def score_loaded(trainer: pl.Trainer, module: SeedLoRAModule, batches: Sequence[Any]) -> dict[str, RowScores]:
    """Score what the test's own pass has scored on further batches, which are training rows."""
    with _progress(trainer) as progress:
        task = progress.add_task("Scoring on training rows", total=len(batches))
        return module.scorer.score_batches(batches, module.scored, on_scores=lambda *_: progress.advance(task))


@contextmanager
def scorer(
    trainer: pl.Trainer,
    module: SeedLoRAModule,
    batches: Sequence[Any],
    title: str,
    *,
    adapters: int,
    on_scores: OnScores = keep_nothing,
) -> Iterator[Score]:
    """Yield a score on batches, with a bar that counts them for every adapter.

    Args:
        trainer: whose first rank shows the bar.
        module: that scores.
        batches: of the rows.
        title: of the bar.
        adapters: that are going to be scored, at most.
        on_scores: called with what each batch says.
    """
    with _progress(trainer) as progress:
        task = progress.add_task(title, total=len(batches) * adapters)

        def tell(batch: Mapping[str, Tensor], labels: Sequence[str], scores: BatchScores) -> None:
            on_scores(batch, labels, scores)
            progress.advance(task, len(labels))

        yield lambda scored: module.scorer.score_rows(scored, batches, on_scores=tell)


def _taken(loader: Loader, limit: int | float) -> list[Any]:
    return [*loader][: limited_batches(len(loader), limit)]


def _progress(trainer: pl.Trainer) -> Progress:
    return progress_bar(TaskProgressColumn(), TimeRemainingColumn(), hidden=not trainer.is_global_zero)
