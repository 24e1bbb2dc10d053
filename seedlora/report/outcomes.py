"""What the tests say: scores, winners, domains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from seedlora.names import BASE, BEST_SEED, FUSED, LOGITS, MEAN_SEED, MEANING, SOUP
from seedlora.report.stored import Facts, read_json
from seedlora.scores.intervals import Difference, adjust_over_tasks, holm, paired_difference, wilson
from seedlora.updates.diagnostics import natural_sort_key

#: How the run's own test rows are called, beside tasks that are scored by generation.
OWN_TEST = "test set"
#: Draws of what chance does to the lead of a seed.
DEALS = 1000


def tests_of(run: Path, seeds: Sequence[str], *, answered: bool) -> list[Facts]:
    """Those with the outcome of each item: the run's own and, if ``answered``, the tasks scored by generation."""
    tasks = read_json(run / "evaluation" / "results.json").get("tasks", {}) if answered else {}
    own, *others = (
        [test_facts(name, stored, seeds) for name, stored in part.items() if stored.get("items")]
        for part in ({OWN_TEST: read_json(run / "results.json")}, tasks)
    )
    # Exact matches and generated answers are two protocols, so two families of tests.
    for family in (own, *others):
        adjust_over_tasks(((row["adapter"], row["against"]), row) for test in family for row in test["comparisons"])
        for test in family:
            test["tasks"] = len(family)
    return [*own, *(test for family in others for test in family)]


def test_facts(name: str, stored: Mapping[str, Any], seeds: Sequence[str]) -> Facts:
    """Scores and comparisons on one test set, from each item's outcome.

    Two adjustments of McNemar's p-values by Holm's rule: ``p_value_holm`` over tasks, for the same two adapters, which
    is added where all tasks are at hand (:func:`seedlora.scores.intervals.adjust_over_tasks`), and
    ``p_value_holm_table`` over all tests that are listed for this test set.

    Args:
        name: of the test set.
        stored: ``items`` by label, and the ``metric``.
        seeds: labels that are single seeds.
    """
    items = item_outcomes(stored)
    seeds = [label for label in items if label in seeds]
    merged = [label for label in items if label not in seeds and label != BASE]
    fused = FUSED if FUSED in items else SOUP
    chance = stored.get("chance")
    controls = [label for label in merged if label in MEANING]
    scores = {label: float(right.mean()) for label, right in items.items()}
    references: dict[str, np.ndarray] = {}
    best = max(seeds, key=scores.__getitem__, default=None)
    if best is not None:
        references = {MEAN_SEED: np.mean([items[seed] for seed in seeds], axis=0), BEST_SEED: items[best]}
    if SOUP in items:
        references[SOUP] = items[SOUP]
    comparisons = [
        {"adapter": label, "against": against, **difference_facts(paired_difference(items[label], reference))}
        for label in merged
        for against, reference in {
            **references,
            **({control: items[control] for control in controls} if label == fused else {}),
        }.items()
        # With one seed its mean is the seed itself.
        if label != against and not (against == MEAN_SEED and len(seeds) == 1)
    ]
    tested = [row for row in comparisons if row["p_value"] is not None]
    for row, p_value in zip(tested, holm([row["p_value"] for row in tested]), strict=True):
        row["p_value_holm_table"] = p_value
    right_seeds = np.sum([items[seed] for seed in seeds], axis=0) if seeds else np.zeros(0)
    return {
        "name": name,
        "metric": stored.get("metric"),
        "items_sha256": stored.get("items_sha256"),
        "chance": chance,
        "n": len(next(iter(items.values()))),
        "scores": [
            {"adapter": label, "right": int(right.sum()), **asdict(wilson(right))} for label, right in items.items()
        ],
        "mean_seed": float(np.mean([scores[seed] for seed in seeds])) if seeds else None,
        "seed_spread": float(np.std([scores[seed] for seed in seeds], ddof=1)) if len(seeds) > 1 else None,
        "best_seed": best,
        "comparisons": comparisons,
        "by_right_seeds": [
            {
                "right_seeds": k,
                "items": int((right_seeds == k).sum()),
                "right": {la: int(items[la][right_seeds == k].sum()) for la in (SOUP, LOGITS, FUSED) if la in items},
            }
            for k in range(len(seeds) + 1)
            if len(seeds) > 1 and merged
        ],
        "domains": [
            row for kind, values in stored.get("domains", {}).items() for row in _domains(kind, values, items, seeds)
        ],
    }


def _domains(kind: str, values: Sequence[str], items: Mapping[str, np.ndarray], seeds: Sequence[str]) -> list[Facts]:
    """Scores within each sub-domain, and by how much its best seed leads the mean seed.

    By chance, one seed leads too: the outcomes of each item are dealt to the seeds anew, :data:`DEALS` times, and
    ``lead_by_chance`` is the mean lead then, ``p_value`` the share of deals (with the true one) that lead as far.
    """
    found, rng = [], np.random.default_rng(0)
    for value in sorted(set(values), key=natural_sort_key):
        where = np.array([other == value for other in values])
        row: Facts = {
            "domain": f"{kind} {value}",
            "items": int(where.sum()),
            "scores": {label: float(right[where].mean()) for label, right in items.items()},
            "winners": _winners({label: int(right[where].sum()) for label, right in items.items()}),
            **dict.fromkeys(("best_seed", "lead", "lead_by_chance", "p_value")),
        }
        if len(seeds) > 1:
            right_IN = np.stack([items[seed][where] for seed in seeds], axis=1)
            leads = [_lead(rng.permuted(right_IN, axis=1)) for _ in range(DEALS)]
            row["best_seed"] = max(seeds, key=row["scores"].__getitem__)
            row["lead"], row["lead_by_chance"] = _lead(right_IN), float(np.mean(leads))
            row["p_value"] = (1 + sum(lead >= row["lead"] - 1e-12 for lead in leads)) / (1 + DEALS)
        found.append(row)
    return found


def _winners(right: Mapping[str, int]) -> list[str]:
    """All that get most items right; none where nobody gets any."""
    most = max(right.values())
    return [label for label, count in right.items() if count == most > 0]


def _lead(right_IN: np.ndarray) -> float:
    """Score of the best seed minus that of the mean seed."""
    scores = right_IN.mean(0)
    return float(scores.max() - scores.mean())


def item_outcomes(stored: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """By label whether each item is right; nothing if that is not stored."""
    digits = stored.get("items", {})
    return {label: np.array([digit == "1" for digit in digits[label]]) for label in digits}


def difference_facts(difference: Difference) -> Facts:
    """Return a paired difference as plain data."""
    return {**asdict(difference), "shown": difference.shown, "p_value_holm": None, "p_value_holm_table": None}
