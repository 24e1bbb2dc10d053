"""The scores of a test set and the comparisons between them, computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from seedlora.names import BASE, BEST_SEED, MEAN_SEED, SOUP, is_replica
from seedlora.records.evaluation import TaskResults
from seedlora.records.results import DifferenceRecord, RunResults
from seedlora.scores.intervals import Difference, Score, adjust_over_tasks, paired_difference, wilson


@dataclass(frozen=True)
class Results:
    """Hold the scores on one test set, the same items for all.

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

    @cached_property
    def outcomes(self) -> dict[str, np.ndarray]:
        """Return by label whether each item is right."""
        return item_outcomes(self.items)

    def difference(self, label: str, against: str) -> Difference:
        """Return the paired difference of two adapters; what was not compared before is computed from the items.

        Args:
            label: of an adapter.
            against: of another, or ``mean seed`` or ``best seed``, which have to be among the comparisons.
        """
        found = self.differences.get(label, {}).get(against)
        return paired_difference(self.outcomes[label], self.outcomes[against]) if found is None else found

    def to_record(self) -> RunResults:
        """Return plain data, for JSON; each McNemar test also as Holm's rule has it, here for one task."""
        differences: dict[str, dict[str, DifferenceRecord]] = {
            label: {against: difference.to_record() for against, difference in references.items()}
            for label, references in self.differences.items()
        }
        adjust_over_tasks(
            ((label, against), difference)
            for label, references in differences.items()
            for against, difference in references.items()
        )
        return {
            "metric": self.metric,
            "scores": {label: score.to_record() for label, score in self.scores.items()},
            "mean_seed": self.mean_seed,
            "seed_spread": self.seed_spread,
            "best_seed": self.best_seed,
            "differences": differences,
            "items": self.items,
        }


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
            name: paired_difference(columns[label], reference, of=len(seeds) if name == MEAN_SEED else 1)
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


def stored_results(record: RunResults | TaskResults, seeds: Sequence[str]) -> Results | None:
    """Return the results that a file holds, with comparisons that are of these seeds.

    They are those of the file where it has them: where all was compared with one adapter (``--against``), or other
    adapters stood among the seeds, they are computed from the outcomes of the items.

    Args:
        record: what the file says.
        seeds: labels that are single seeds.

    Returns:
        ``None`` if the outcomes of the items are not stored.
    """
    items = record.get("items")
    if not items:
        return None
    own = [label for label in items if label in seeds]
    compared_as_seeds = [label for label in items if is_replica(label)] if record.get("mean_seed") is not None else []
    scores = record.get("scores")
    if not scores or not own or compared_as_seeds != own:
        outcomes = item_outcomes(items)
        return results(np.stack(list(outcomes.values()), axis=1), list(items), own, metric=record.get("metric", ""))
    return Results(
        metric=record.get("metric", ""),
        scores={label: Score.from_record(score) for label, score in scores.items()},
        mean_seed=record.get("mean_seed"),
        seed_spread=record.get("seed_spread"),
        best_seed=record.get("best_seed"),
        differences={
            label: {against: Difference.from_record(difference) for against, difference in references.items()}
            for label, references in record["differences"].items()
        },
        items=items,
    )


def item_outcomes(items: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Return by label whether each item is right.

    Args:
        items: by label one digit for each item, 1 where it is right.
    """
    return {label: np.array([digit == "1" for digit in digits]) for label, digits in items.items()}
