"""Scores: exact match without generation, intervals, tests."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import stats

from seedlora.scores.intervals import adjust_over_tasks, mcnemar, paired_difference, wilson
from seedlora.scores.results import results, stored_results
from seedlora.scores.tables import results_table, verdict
from seedlora.training.scoring import ScoredLabels
from tests.helpers.models import built, make_data


@pytest.mark.usefixtures("float64")
def test_exact_match_is_what_greedy_generation_gives(tiny_llama):
    """On a model that was trained until it gets some answers right and others wrong."""
    module = built(tiny_llama, 42, r=16)
    data = make_data(task="chain_sum", num_train=16, num_test=0, task_options={"max_digits": 1, "max_terms": 2})
    data.tokenizer = module.tokenizer
    data.setup("fit")
    rows = data.rows["train"]
    ids, labels = rows.padded(range(16))
    module.stack.route(["seed_42"])
    optimizer = torch.optim.AdamW(module.stack.parameters("seed_42"), lr=2e-2)
    matches = 0
    for _ in range(400):
        losses, right, _ = module.token_losses(ids, labels)
        matches = int(right.all(1).sum())
        if 0 < matches < 16:
            break
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
    assert 0 < matches < 16
    module.model.eval()
    with torch.no_grad():
        scored = module.scorer.score({"input_ids": ids, "labels": labels}, ScoredLabels({"it": "seed_42"})).correct[0]
        generated = []
        for i in range(16):
            said = labels[i] != -100
            start = int(said.nonzero()[0])
            answer = ids[i][said]
            new = module.model.generate(
                input_ids=ids[i : i + 1, :start], attention_mask=torch.ones(1, start), max_new_tokens=len(answer),
                do_sample=False, use_cache=False, pad_token_id=0,
            )  # fmt: skip
            generated.append(torch.equal(new[0, start:], answer))
    assert scored.tolist() == generated


def test_wilson_against_the_closed_form():
    score = wilson(np.array([True] * 37 + [False] * 63))
    z, p, n = stats.norm.ppf(0.975), 0.37, 100
    centre, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert (score.value, score.n) == (0.37, 100)
    assert score.low == pytest.approx((centre - half) / (1 + z**2 / n))
    assert score.high == pytest.approx((centre + half) / (1 + z**2 / n))


def test_the_paired_interval_agrees_with_scipy_s_bootstrap():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 300)) < np.array([[0.6], [0.5]])
    ours = paired_difference(a, b)
    difference = a.astype(float) - b
    theirs = stats.bootstrap((difference,), np.mean, method="percentile", n_resamples=10_000, rng=1).confidence_interval
    assert ours.value == pytest.approx(difference.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.01)
    assert ours.high == pytest.approx(theirs.high, abs=0.01)
    assert ours == paired_difference(a, b)


def test_mcnemar_is_the_binomial_test_on_the_discordant_items():
    a = np.array([True] * 9 + [False] * 2 + [True] * 30)
    b = np.array([False] * 9 + [True] * 2 + [True] * 30)
    assert mcnemar(a, b) == pytest.approx(2 * stats.binom.cdf(2, 11, 0.5))
    assert mcnemar(a, a) == 1.0


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


def test_holm_over_tasks_is_for_the_same_two_adapters():
    rows = [{"p_value": p} for p in (0.02, 0.03, 0.01, None)]
    adjust_over_tasks(zip(["a", "a", "b", "b"], rows, strict=True))
    assert [row.get("p_value_holm") for row in rows] == [0.04, 0.04, 0.01, None]


def test_a_difference_whose_interval_covers_0_is_not_claimed():
    correct = np.array([[i % 2, i % 2, i % 3 == 0] for i in range(40)], dtype=bool)
    found = results(correct, ["seed_1", "seed_2", "soup"], ["seed_1", "seed_2"], metric="x")
    assert verdict(found).splitlines()[0] == "Soup: no difference from mean seed shown."
