"""The scores of a run and the comparisons between them, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from seedlora.names import BASE, BEST_SEED, MEAN_SEED, SOUP
from seedlora.scores.intervals import Difference, Score, adjust_over_tasks, paired_difference, wilson


@dataclass(frozen=True)
class Results:
    """Scores on one test set, the same items for all.

    Args:
        metric: what is scored.
        scores: by label.
        mean_seed: mean score of the seeds; ``None`` without seeds.
        seed_spread: standard deviation of the seeds' scores (n - 1); ``None`` for one seed.
        best_seed: label of the seed with the highest score on these very items, which flatters it; ``None`` for one.
        differences: label to what it is compared with (``mean seed``, ``best seed``, ``soup``) to the paired
            difference.
        items: by label one digit for each item, 1 where it is right: all else can be computed from them.
    """

    metric: str
    scores: dict[str, Score]
    mean_seed: float | None
    seed_spread: float | None
    best_seed: str | None
    differences: dict[str, dict[str, Difference]]
    items: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; each McNemar test also as Holm's rule has it, here for one task."""
        found = asdict(self)
        adjust_over_tasks(
            ((label, reference), difference)
            for label, references in found["differences"].items()
            for reference, difference in references.items()
        )
        return found


def results(
    correct: np.ndarray, labels: Sequence[str], seeds: Sequence[str], *, metric: str, against: str | None = None
) -> Results:
    """Score all adapters and compare the merged ones with mean seed, best seed and soup, or all with one of them.

    Args:
        correct: bool, shape (items, labels).
        labels: names of the columns.
        seeds: those that are single seeds.
        metric: what was scored.
        against: the label that all are compared with; default: merged ones with mean seed, best seed and soup.
    """
    columns = dict(zip(labels, correct.T, strict=True))
    references = {MEAN_SEED: np.mean([columns[seed] for seed in seeds], axis=0)} if seeds else {}
    seed_scores = [columns[seed].mean() for seed in seeds]
    best_seed = max(seeds, key=lambda seed: columns[seed].mean()) if len(seeds) > 1 else None
    if best_seed is not None:
        references[BEST_SEED] = columns[best_seed]
    if SOUP in columns and seeds:
        references[SOUP] = columns[SOUP]
    compared = [label for label in labels if label not in seeds and label != BASE]
    if against is not None:
        references, compared = {against: columns[against]}, [label for label in labels if label != against]
    differences = {
        label: {
            name: paired_difference(columns[label], reference)
            for name, reference in references.items()
            if name != label
        }
        for label in compared
    }
    return Results(
        metric=metric,
        scores={label: wilson(column) for label, column in columns.items()},
        mean_seed=float(np.mean(seed_scores)) if seeds else None,
        seed_spread=float(np.std(seed_scores, ddof=1)) if len(seeds) > 1 else None,
        best_seed=best_seed,
        differences=differences,
        items={label: "".join("01"[int(right)] for right in column) for label, column in columns.items()},
    )
