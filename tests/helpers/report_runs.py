"""Runs to report on: with outcomes of their test as a better model would have them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from seedlora.names import MEANING
from seedlora.report.page import write_report
from seedlora.scores.results import results as score
from tests.helpers.commands import train
from tests.helpers.report_page import check_page, comparison_tables, heat_maps, run_numbers, run_tables

SEEDS = ["seed_11", "seed_42", "seed_202"]
#: What ``--controls all`` gives.
CONTROLS = ["long_seed", "wide_seed", "gain_seed", "gain_soup", "greedy_soup", "logit_mean"]


def train_into(folder: Path, base_model: str, *options: str) -> int:
    """Run ``train.py`` in float32 into a folder; return its exit code."""
    return train(base_model, "--model.dtype", "float32", "--ensemble.dirpath", str(folder), *options)


def items(n: int) -> dict[str, str]:
    """Draw which of n items each adapter gets right, as digits: the fused adapter is the best."""
    rng = np.random.default_rng(3)
    easy = rng.random(n)
    shares = {"base": 0.1, "seed_11": 0.5, "seed_42": 0.55, "seed_202": 0.45, "soup": 0.55, "fused": 0.75}
    return {label: "".join("01"[int(e + 0.2 * rng.random() < share)] for e in easy) for label, share in shares.items()}


def with_items(stored: dict, outcomes: dict[str, str]) -> dict:
    """Return a test as a run stores it, with other outcomes and what follows from them."""
    right = np.array([[digit == "1" for digit in digits] for digits in outcomes.values()]).T
    seeds = [label for label in outcomes if label.startswith("seed_")]
    return stored | score(right, list(outcomes), seeds, metric="it").to_record()


def outcomes(**only: tuple[int, int]) -> dict[str, str]:
    """Return the outcomes of items that all get right, then those that only the fused adapter does, and only soup."""
    ((fused, soup),) = only.values()
    return {
        "seed_11": "1" * (20 + fused + soup),
        "seed_42": "1" * 20 + "0" * (fused + soup),
        "soup": "1" * 20 + "0" * fused + "1" * soup,
        "fused": "1" * 20 + "1" * fused + "0" * soup,
    }


def check_numbers(folder: Path, html: str | None = None, text: str | None = None) -> None:
    """See that every number of a folder's page, or of another page, is in its ``report.json``."""
    found = json.loads((folder / "report.json").read_text())
    html = html or (folder / "report.html").read_text()
    text = text or (folder / "report.md").read_text()
    if "tests" in found:
        tables, allowed, cells = run_tables(found, MEANING), run_numbers(found), heat_maps(found)
    else:
        tables, cells = comparison_tables(found), {}
        allowed = {str(len(found["runs"])), str(found["confidence_percent"])}
    check_page(found, tables, allowed, html, text, cells)


def written_text(run: Path) -> str:
    """Write the report of a run; return its Markdown."""
    write_report(run)
    assert (run / "report.html").is_file()
    return (run / "report.md").read_text()
