"""Compare several runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from seedlora.names import MEAN_SEED
from seedlora.report.outcomes import OWN_TEST, difference_facts, item_outcomes
from seedlora.report.sentences import points
from seedlora.report.stored import Facts, read_json
from seedlora.scores.intervals import holm, paired_difference


def comparison(runs: Sequence[Facts], items: Sequence[Mapping[str, np.ndarray]]) -> Facts:
    """Several runs side by side; those whose first test set has the same items are compared item by item.

    Args:
        runs: facts of each.
        items: of each run's first test set, by label whether each item was right.
    """
    rows = [_run_row(run) for run in runs]
    paired: list[Facts] = []
    apart: list[str] = []
    for i, row in enumerate(rows):
        first = next((j for j in range(i) if row["items_sha256"] and rows[j]["items_sha256"] == row["items_sha256"]), i)
        labels = [runs[j]["merged"] for j in (i, first)]
        if first == i or any(label not in items[j] for label, j in zip(labels, (i, first), strict=True)):
            if i and row["n"]:
                apart.append(row["run"])
            continue
        difference = paired_difference(items[i][labels[0]], items[first][labels[1]])
        paired.append({"run": row["run"], "against": rows[first]["run"], **difference_facts(difference)})
    for row, p_value in zip(paired, holm([row["p_value"] for row in paired]), strict=True):
        row["p_value_holm_table"] = p_value
    return {
        "runs": rows,
        "verdict": " ".join(_compared(row, runs[0]["confidence_percent"]) for row in paired)
        or "No two of these runs were tested on the same items.",
        "paired": paired,
        "confidence_percent": runs[0]["confidence_percent"],
        "missing": [
            *(
                f"{name} was not tested on the items of a run before it, so far as is stored: its scores stand apart."
                for name in apart
            ),
            *(f"{run['run']}: {sentence}" for run in runs for sentence in run["missing"]),
        ],
    }


def _compared(row: Mapping[str, Any], percent: int) -> str:
    judged = "no difference" if not row["shown"] else "better" if row["value"] > 0 else "worse"
    return (
        f"{row['run']} against {row['against']}, fused adapters on the same {row['n']:,} items: "
        f"{judged}{'' if row['shown'] else ' shown'}, {points(row, percent)}."
    )


def first_items(run: str | Path) -> dict[str, np.ndarray]:
    """The outcomes of a run's own test set by label; empty without them."""
    return item_outcomes(read_json(Path(run) / "results.json"))


def _run_row(run: Facts) -> Facts:
    test = next((test for test in run["tests"] if test["name"] == OWN_TEST), None)
    label = run["merged"]
    score = next((row for row in test["scores"] if row["adapter"] == label), None) if test else None
    versus = (
        next((r for r in test["comparisons"] if r["adapter"] == label and r["against"] == MEAN_SEED), None)
        if test
        else None
    )
    weights = run["weights"]
    cosines = np.array(weights["cosines"] if weights else [])
    pairs = cosines[np.tril_indices(len(cosines), -1)] if len(cosines) > 1 else np.zeros(0)
    return {
        "run": run["run"],
        "method": run["method"],
        "seeds": len(run["trained"]),
        "n": test and test["n"],
        "items_sha256": test and test["items_sha256"],
        "mean_seed": test and test["mean_seed"],
        "seed_spread": test and test["seed_spread"],
        "fused": score,
        "against_mean_seed": versus,
        "mean_cosine": float(np.mean(pairs)) if len(pairs) else None,
        "verdict": run["verdict"],
    }
