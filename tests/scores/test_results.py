"""The results of a test, computed and stored."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from seedlora.scores.intervals import paired_difference
from seedlora.scores.results import results, stored_results
from seedlora.scores.tables import results_table, verdict


def test_results_compare_the_merged_adapters_with_mean_seed_and_soup():
    rng = np.random.default_rng(1)
    correct = rng.random((200, 5)) < np.array([0.0, 0.4, 0.5, 0.5, 0.9])
    found = results(correct, ["base", "seed_1", "seed_2", "soup", "fused"], ["seed_1", "seed_2"], metric="x")
    fused = found.differences["fused"]
    assert fused["soup"].value == pytest.approx(correct[:, 4].mean() - correct[:, 3].mean())
    assert fused["mean seed"].value == pytest.approx(correct[:, 4].mean() - correct[:, 1:3].mean())
    assert fused["mean seed"].p_value is None
    assert fused["soup"].p_value is not None
    assert set(found.differences["soup"]) == {"mean seed", "best seed"}
    best = max(("seed_1", 1), ("seed_2", 2), key=lambda seed: correct[:, seed[1]].sum())
    assert found.best_seed == best[0]
    assert fused["best seed"].value == pytest.approx(correct[:, 4].mean() - correct[:, best[1]].mean())
    said = verdict(found)
    assert "The fused adapter: better than mean seed by" in said
    assert f"Against {best[0]}, the best seed of these very items, which flatters it: +" in said
    assert f"McNemar's exact test, p against {best[0]} {fused['best seed'].p_value:.2g}, soup " in said
    stored = found.to_record()["differences"]["fused"]
    assert stored["best seed"]["p_value_holm"] == stored["best seed"]["p_value"] == fused["best seed"].p_value
    assert "p_value_holm" not in stored["mean seed"]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(results_table(found))
    assert "best seed" not in console.export_text()


def test_stored_results_are_those_of_the_test_unless_they_compare_something_else():
    rng = np.random.default_rng(2)
    labels, seeds = ["base", "seed_1", "seed_2", "seed_3", "soup", "fused"], ["seed_1", "seed_2", "seed_3"]
    correct = rng.random((90, 6)) < np.array([0.1, 0.4, 0.5, 0.5, 0.6, 0.7])
    found = results(correct, labels, seeds, metric="x")
    record = json.loads(json.dumps(found.to_record()))
    assert stored_results(record, seeds) == found
    # What is in the file is taken, not computed again.
    record["differences"]["fused"]["soup"]["value"] = 7.0
    assert stored_results(record, seeds).difference("fused", "soup").value == 7.0
    assert found.difference("fused", "seed_2") == paired_difference(correct[:, 5], correct[:, 2])
    against = results(correct, labels, [], metric="x", against="base").to_record()
    assert stored_results(against, seeds) == found
    # A seed that is no longer there is none of the seeds.
    fewer = stored_results(record, seeds[:2])
    assert fewer == results(correct, labels, seeds[:2], metric="x")
    assert fewer.mean_seed != found.mean_seed
    del record["items"]
    assert stored_results(record, seeds) is None
