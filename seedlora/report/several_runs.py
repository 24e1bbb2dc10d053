"""Compare several runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seedlora.names import BASE, MEAN_SEED, SOUP
from seedlora.records.report import ComparisonReport, Report, RunComparison, RunRow
from seedlora.records.results import RESULTS
from seedlora.report.outcomes import OWN_TEST, adjust_table, pair_record
from seedlora.scores.intervals import paired_difference
from seedlora.scores.results import item_outcomes
from seedlora.scores.wording import PERCENT, difference_in_points, judge


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
    settings = differing_settings([report["reproduce"]["settings"] for report in reports])
    rows = [_run_row(report, own) for report, own in zip(reports, settings, strict=True)]
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
        "title": _title(reports),
        "differing": list(settings[0]),
        "best": _best(rows),
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


def differing_settings(runs: Sequence[Mapping[str, object]]) -> list[dict[str, str]]:
    """Return the settings in which runs differ, by their names in the order of the first that has them, as text.

    A run without such a setting has an empty text.

    >>> differing_settings([{"model.r": 8, "data": "GSM8K"}, {"model.r": 16, "data": "GSM8K"}])
    [{'model.r': '8'}, {'model.r': '16'}]
    """
    names = dict.fromkeys(name for run in runs for name in run)
    texts = [{name: _setting_text(name, run[name]) if name in run else "" for name in names} for run in runs]
    differing = [name for name in names if len({text[name] for text in texts}) > 1]
    return [{name: text[name] for name in differing} for text in texts]


def _setting_text(name: str, value: object) -> str:
    """Write the value of a setting; of a checksum its first digits."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:8] if name.startswith("sha256 ") else text


def _title(reports: Sequence[Report]) -> str:
    """Name the runs by what they have in common."""
    said = {(report["front"]["model"], report["front"]["data"]) for report in reports}
    if len(said) > 1:
        return f"{len(reports)} SeedLoRA runs compared"
    ((model, data),) = said
    return f"{model or 'SeedLoRA'} on {data}: {len(reports)} runs compared"


def read_items(folder: str | Path) -> dict[str, np.ndarray]:
    """Return the outcomes of a run's own test set by label; empty without them."""
    results = RESULTS.read(Path(folder))
    return {} if results is None else item_outcomes(results.get("items", {}))


def _best(rows: Sequence[RunRow]) -> str | None:
    """Rank what the runs advise to use, where all were tested on the same items."""
    tested = [(row["run"], row["use"], score["value"]) for row in rows if (score := row["used"]) is not None]
    if len(tested) < len(rows) or len({row["items_sha256"] for row in rows}) > 1 or rows[0]["items_sha256"] is None:
        return None
    ranked = sorted(tested, key=lambda each: -each[2])
    said = ", then ".join(f"{use} of {run} with {PERCENT(value)} %" for run, use, value in ranked)
    return f"Of what the runs advise, most of the same items are right by {said}. These items picked the first."


def _verdict_of_pair(row: RunComparison) -> str:
    return (
        f"{row['run']} against {row['against']}, fused adapters on the same {row['n']:,} items: "
        f"{judge(row['value'], shown=row['shown'])}, {difference_in_points(row['value'], row['low'], row['high'])}."
    )


def _run_row(report: Report, settings: dict[str, str]) -> RunRow:
    test = next((test for test in report["tests"] if test["name"] == OWN_TEST), None)
    label = report["merged"]
    scores = {} if test is None else {row["adapter"]: row for row in test["scores"]}
    comparisons = [] if test is None else [row for row in test["comparisons"] if row["adapter"] == label]
    return {
        "run": report["run"],
        "settings": settings,
        "method": report["method"],
        "seeds": len(report["trained"]),
        "n": None if test is None else test["n"],
        "items_sha256": None if test is None else test["items_sha256"],
        "base": scores.get(BASE),
        "mean_seed": None if test is None else test["mean_seed"],
        "seed_spread": None if test is None else test["seed_spread"],
        "soup": scores.get(SOUP),
        "fused": scores.get(label or ""),
        "against_mean_seed": next((row for row in comparisons if row["against"] == MEAN_SEED), None),
        "mean_cosine": _mean_cosine(report),
        "use": report["front"]["adapter"],
        "used": scores.get(report["front"]["adapter"] or ""),
        "tokens": report["front"]["tokens"],
        "seconds": report["front"]["seconds"],
        "verdict": report["verdict"],
    }


def _mean_cosine(report: Report) -> float | None:
    """Return the mean cosine of two seeds' updates, if there are two."""
    cosines = np.array([] if report["weights"] is None else report["weights"]["cosines"])
    if len(cosines) < 2:
        return None
    return float(np.mean(cosines[np.tril_indices(len(cosines), -1)]))
