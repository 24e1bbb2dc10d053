"""Intervals and tests against closed forms and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from seedlora.scores.intervals import adjust_over_tasks, loss_difference, mcnemar, paired_difference, wilson
from seedlora.scores.row_scores import RowScores


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


def test_holm_over_tasks_is_for_the_same_two_adapters():
    rows = [{"p_value": p} for p in (0.02, 0.03, 0.01, None)]
    adjust_over_tasks(zip(["a", "a", "b", "b"], rows, strict=True))
    assert [row.get("p_value_holm") for row in rows] == [0.04, 0.04, 0.01, None]


def test_the_interval_of_a_loss_difference_resamples_rows_with_their_tokens():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 60, size=80)
    first, second = (torch.tensor(tokens * rng.normal(mean, 0.4, size=80)) for mean in (2.0, 1.8))
    a, b = (RowScores(losses, torch.zeros(80, dtype=torch.bool), torch.tensor(tokens)) for losses in (first, second))
    found = loss_difference(a, b)
    draws = []
    for _ in range(4000):
        some = rng.integers(80, size=80)
        draws.append(float((first - second)[some].sum()) / tokens[some].sum())
    assert found["value"] == pytest.approx(a.loss - b.loss)
    np.testing.assert_allclose([found["low"], found["high"]], np.quantile(draws, [0.025, 0.975]), atol=0.012)
    # One difference per token, whatever the row's length: no resample can say otherwise.
    c = RowScores(second + 0.25 * torch.tensor(tokens), b.correct, b.tokens)
    same = loss_difference(c, b)
    assert (same["low"], same["high"]) == pytest.approx((0.25, 0.25))
