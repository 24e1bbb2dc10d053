"""Compare several runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seedlora.names import MEAN_SEED
from seedlora.records.report import ComparisonReport, Report, RunComparison, RunRow
from seedlora.records.results import RESULTS
from seedlora.report.outcomes import OWN_TEST, adjust_table, pair_record
from seedlora.scores.intervals import paired_difference
from seedlora.scores.results import item_outcomes
from seedlora.scores.wording import difference_in_points, judge


@dataclass(frozen=True)
class ComparedRun:
    """Hold one of several runs.

    Args:
        report: all that is known of it.
        items: of its own test set, by label whether each item is right.
    """

    report: Report
    items: Mapping[str, np.ndarray]


def compare_runs(runs: Sequence[ComparedRun]) -> ComparisonReport:
    """Put several runs side by side; those whose own test set has the same items are compared item by item."""
    reports = [run.report for run in runs]
    rows = [_run_row(report) for report in reports]
    paired: list[RunComparison] = []
    apart: list[str] = []
    for i, (run, row) in enumerate(zip(runs, rows, strict=True)):
        same = (j for j in range(i) if row["items_sha256"] and rows[j]["items_sha256"] == row["items_sha256"])
        first = next(same, None)
        a = run.items.get(run.report["merged"] or "")
        b = None if first is None else runs[first].items.get(runs[first].report["merged"] or "")
        if first is not None and a is not None and b is not None:
            pair = pair_record(paired_difference(a, b))
            paired.append({"run": row["run"], "against": rows[first]["run"], **pair})
        elif i and row["n"]:
            apart.append(row["run"])
    adjust_table(paired)
    return {
        "runs": rows,
        "verdict": " ".join(map(_verdict_of_pair, paired)) or "No two of these runs were tested on the same items.",
        "paired": paired,
        "confidence_percent": reports[0]["confidence_percent"],
        "missing": [
            *(
                f"{name} was not tested on the items of a run before it, so far as is stored: its scores stand apart."
                for name in apart
            ),
            *(f"{report['run']}: {sentence}" for report in reports for sentence in report["missing"]),
        ],
    }


def read_items(folder: str | Path) -> dict[str, np.ndarray]:
    """Return the outcomes of a run's own test set by label; empty without them."""
    results = RESULTS.read(Path(folder))
    return {} if results is None else item_outcomes(results.get("items", {}))


def _verdict_of_pair(row: RunComparison) -> str:
    return (
        f"{row['run']} against {row['against']}, fused adapters on the same {row['n']:,} items: "
        f"{judge(row['value'], shown=row['shown'])}, {difference_in_points(row['value'], row['low'], row['high'])}."
    )


def _run_row(report: Report) -> RunRow:
    test = next((test for test in report["tests"] if test["name"] == OWN_TEST), None)
    label = report["merged"]
    scores = [] if test is None else [row for row in test["scores"] if row["adapter"] == label]
    comparisons = [] if test is None else [row for row in test["comparisons"] if row["adapter"] == label]
    return {
        "run": report["run"],
        "method": report["method"],
        "seeds": len(report["trained"]),
        "n": None if test is None else test["n"],
        "items_sha256": None if test is None else test["items_sha256"],
        "mean_seed": None if test is None else test["mean_seed"],
        "seed_spread": None if test is None else test["seed_spread"],
        "fused": next(iter(scores), None),
        "against_mean_seed": next((row for row in comparisons if row["against"] == MEAN_SEED), None),
        "mean_cosine": _mean_cosine(report),
        "verdict": report["verdict"],
    }


def _mean_cosine(report: Report) -> float | None:
    """Return the mean cosine of two seeds' updates, if there are two."""
    cosines = np.array([] if report["weights"] is None else report["weights"]["cosines"])
    if len(cosines) < 2:
        return None
    return float(np.mean(cosines[np.tril_indices(len(cosines), -1)]))
