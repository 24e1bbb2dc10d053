"""Describe what the tests say: scores, comparisons, winners, sub-domains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from seedlora.names import BASE, BEST_SEED, EVALUATION_FOLDER, FUSED, LOGITS, MEAN_SEED, MEANING, SOUP
from seedlora.records.evaluation import EVALUATION_RESULTS, TaskResults
from seedlora.records.report import AdapterComparison, DomainRow, PairedDifference, RightSeeds, TestSet
from seedlora.records.results import RunResults
from seedlora.report.stored import StoredRun
from seedlora.scores.intervals import Difference, adjust_over_tasks, holm
from seedlora.scores.results import Results, stored_results
from seedlora.updates.diagnostics import natural_sort_key

#: How the run's own test rows are called, beside tasks that are scored by generation.
OWN_TEST = "test set"
#: Draws of what chance does to the lead of a seed.
DEALS = 1000


def describe_tests(run: StoredRun, *, answered: bool) -> list[TestSet]:
    """Describe the test sets that have the outcome of each item.

    Args:
        run: whose.
        answered: whether the tasks that were scored by generation count too.
    """
    evaluation = EVALUATION_RESULTS.read(run.folder / EVALUATION_FOLDER) if answered else None
    tasks = {} if evaluation is None else evaluation["tasks"]
    own = [] if run.results is None else [describe_test(OWN_TEST, run.results, run.trained)]
    others = [describe_test(name, task, run.trained, chance=task.get("chance")) for name, task in tasks.items()]
    # Exact matches and generated answers are two protocols, so two families of tests.
    families = [[test for test in family if test is not None] for family in (own, others)]
    for family in families:
        adjust_over_tasks(((row["adapter"], row["against"]), row) for test in family for row in test["comparisons"])
        for test in family:
            test["tasks"] = len(family)
    return [test for family in families for test in family]


def describe_test(
    name: str, record: RunResults | TaskResults, seeds: Sequence[str], *, chance: float | None = None
) -> TestSet | None:
    """Describe one test set; ``None`` if the outcomes of its items are not stored.

    Two adjustments of McNemar's p-values by Holm's rule: ``p_value_holm`` over tasks, for the same two adapters, which
    is added where all tasks are at hand (:func:`seedlora.scores.intervals.adjust_over_tasks`), and
    ``p_value_holm_table`` over all tests that are listed for this test set.

    Args:
        name: of the test set.
        record: what was stored of it.
        seeds: labels that are single seeds.
        chance: the share that guessing gets right, where it is known.
    """
    results = stored_results(record, seeds)
    if results is None:
        return None
    seeds = [label for label in results.items if label in seeds]
    merged = [label for label in results.items if label not in seeds and label != BASE]
    scores = {label: float(right.mean()) for label, right in results.outcomes.items()}
    return {
        "name": name,
        "metric": record.get("metric"),
        "items_sha256": record.get("items_sha256"),
        "chance": chance,
        "n": len(next(iter(results.items.values()))),
        "scores": [
            {"adapter": label, "right": int(results.outcomes[label].sum()), **score.to_record()}
            for label, score in results.scores.items()
        ],
        "mean_seed": results.mean_seed,
        "seed_spread": results.seed_spread,
        "best_seed": max(seeds, key=scores.__getitem__, default=None),
        "comparisons": _compare(results, seeds, merged),
        "by_right_seeds": _count_right_seeds(results.outcomes, seeds) if len(seeds) > 1 and merged else [],
        "domains": [
            row
            for kind, values in record.get("domains", {}).items()
            for row in _describe_domains(kind, values, results.outcomes, seeds)
        ],
        "tasks": 1,
    }


def _compare(results: Results, seeds: Sequence[str], merged: Sequence[str]) -> list[AdapterComparison]:
    """Compare merged adapters with seeds and soup, and the fused one with the controls too."""
    fused = FUSED if FUSED in results.items else SOUP
    controls = [label for label in merged if label in MEANING]
    references = [*((MEAN_SEED, BEST_SEED) if seeds else ()), *([SOUP] if SOUP in results.items else [])]
    rows: list[AdapterComparison] = []
    for label in merged:
        for against in dict.fromkeys([*references, *(controls if label == fused else [])]):
            # With one seed its mean is the seed itself, and the best one too.
            if label == against or (against == MEAN_SEED and len(seeds) == 1):
                continue
            other = seeds[0] if against == BEST_SEED and len(seeds) == 1 else against
            rows.append({"adapter": label, "against": against, **pair_record(results.difference(label, other))})
    adjust_table(rows)
    return rows


def adjust_table(rows: Sequence[PairedDifference]) -> None:
    """Adjust the p-values of all rows that have one for how many there are, by Holm's rule."""
    tested = [(row, p_value) for row in rows if (p_value := row["p_value"]) is not None]
    for (row, _), adjusted in zip(tested, holm([p_value for _, p_value in tested]), strict=True):
        row["p_value_holm_table"] = adjusted


def pair_record(difference: Difference) -> PairedDifference:
    """Return a paired difference as plain data, not adjusted yet."""
    return {
        "value": difference.value,
        "low": difference.low,
        "high": difference.high,
        "n": difference.n,
        "p_value": difference.p_value,
        "shown": difference.shown,
        "p_value_holm": None,
        "p_value_holm_table": None,
    }


def _count_right_seeds(items: Mapping[str, np.ndarray], seeds: Sequence[str]) -> list[RightSeeds]:
    """Count the items by how many seeds get them right, and who else does."""
    right_seeds = np.sum([items[seed] for seed in seeds], axis=0)
    return [
        {
            "right_seeds": k,
            "items": int((right_seeds == k).sum()),
            "right": {la: int(items[la][right_seeds == k].sum()) for la in (SOUP, LOGITS, FUSED) if la in items},
        }
        for k in range(len(seeds) + 1)
    ]


def _describe_domains(
    kind: str, values: Sequence[str], items: Mapping[str, np.ndarray], seeds: Sequence[str]
) -> Iterator[DomainRow]:
    """Score each sub-domain apart, and measure by how much its best seed leads the mean seed.

    By chance, one seed leads too: the outcomes of each item are dealt to the seeds anew, :data:`DEALS` times, and
    ``lead_by_chance`` is the mean lead then, ``p_value`` the share of deals (with the true one) that lead as far.
    """
    rng = np.random.default_rng(0)
    for value in sorted(set(values), key=natural_sort_key):
        where = np.array([other == value for other in values])
        scores = {label: float(right[where].mean()) for label, right in items.items()}
        row: DomainRow = {
            "domain": f"{kind} {value}",
            "items": int(where.sum()),
            "scores": scores,
            "winners": _winners({label: int(right[where].sum()) for label, right in items.items()}),
            "best_seed": None,
            "lead": None,
            "lead_by_chance": None,
            "p_value": None,
        }
        if len(seeds) > 1:
            right_IN = np.stack([items[seed][where] for seed in seeds], axis=1)
            lead, leads = _lead(right_IN), [_lead(rng.permuted(right_IN, axis=1)) for _ in range(DEALS)]
            row["best_seed"] = max(seeds, key=scores.__getitem__)
            row["lead"], row["lead_by_chance"] = lead, float(np.mean(leads))
            row["p_value"] = (1 + sum(other >= lead - 1e-12 for other in leads)) / (1 + DEALS)
        yield row


def _winners(right: Mapping[str, int]) -> list[str]:
    """Return all that get most items right; none where nobody gets any."""
    most = max(right.values())
    return [label for label, count in right.items() if count == most > 0]


def _lead(right_IN: np.ndarray) -> float:
    """Return the score of the best seed minus that of the mean seed."""
    scores = right_IN.mean(0)
    return float(scores.max() - scores.mean())
