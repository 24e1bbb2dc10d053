"""The scores of a run and the comparisons between them, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from seedlora.evaluation import Difference, Score, adjust_over_tasks, paired_difference, wilson

BASE, MEAN_SEED, BEST_SEED, SOUP, FUSED = "base", "mean seed", "best seed", "soup", "fused"
#: The controls, under names that fit into a table.
GAIN_SEED, GAIN_SOUP, GREEDY = "gain_seed", "gain_soup", "greedy_soup"
LOGITS, LONG_SEED, WIDE_SEED = "logit_mean", "long_seed", "wide_seed"
#: What each of them is.
MEANING = {
    LONG_SEED: "one seed, trained for the tokens of all",
    WIDE_SEED: "one seed, trained with the rank of all",
    LOGITS: "the mean of the seeds' probabilities, no adapter",
    GAIN_SEED: "the best seed of the validation rows times the gain of the fused adapter",
    GAIN_SOUP: "soup times the factor that is best on the validation rows",
    GREEDY: "soup of the seeds that do not harm on the validation rows",
}
NO_CONTROLS, UNTRAINED, ALL_CONTROLS = "none", "untrained", "all"
#: The file of a run that holds what the validation rows said when the seeds were fused.
SELECTION_NAME = "selection.json"
#: The file that holds how long each adapter was trained, on how many tokens, and which step was kept.
TRAINED_NAME = "trained.json"


def seed_name(seed: int) -> str:
    """The label of a seed's adapter, which is the name of its folder too."""
    return f"seed_{seed}"


def nothing_for_one_seed(options: Mapping[str, object]) -> str | None:
    """What was asked for and does nothing where there is one seed, in a sentence.

    Args:
        options: of the command line, and whether each was given.
    """
    asked = [option for option, given in options.items() if given]
    does = "does" if len(asked) == 1 else "do"
    return f"With one seed {', '.join(asked)} {does} nothing: there is nothing to fuse or compare." if asked else None


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
