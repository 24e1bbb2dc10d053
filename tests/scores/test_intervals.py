"""Intervals and tests against closed forms and scipy."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from scipy import stats

from seedlora.scores.intervals import (
    adjust_over_tasks,
    chance,
    loss_difference,
    mcnemar,
    paired_difference,
    ratio_interval,
    wilson,
)
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


def test_the_interval_of_a_loss_difference_is_that_of_rows_with_their_tokens():
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
    np.testing.assert_allclose([found["low"], found["high"]], np.quantile(draws, [0.025, 0.975]), atol=0.02)
    # One difference per token, whatever the row's length: no resample can say otherwise.
    c = RowScores(second + 0.25 * torch.tensor(tokens), b.correct, b.tokens)
    same = loss_difference(c, b)
    assert (same["low"], same["high"]) == pytest.approx((0.25, 0.25))


def _alike(rng, n, kind):
    """Whether a difference is shown between adapters that are alike."""
    if kind == "scores":
        return paired_difference(rng.normal(size=n), rng.normal(size=n)).shown
    if kind == "losses":
        tokens, hard, none = rng.integers(1, 60, size=n), rng.lognormal(size=n), torch.zeros(n, dtype=torch.bool)
        rows = [torch.tensor(tokens * (hard + rng.normal(0, 0.3, size=n))) for _ in range(2)]
        return loss_difference(*(RowScores(losses, none, torch.tensor(tokens)) for losses in rows))["shown"]
    others, share = kind
    right = rng.random((n, 1 + others)) < (rng.beta(0.5, 0.5, size=(n, 1)) if share is None else share)
    return paired_difference(right[:, 0], right[:, 1:].mean(1), of=others).shown


KINDS = ["scores", "losses", (1, 0.5), (1, 0.05), (3, 0.02), (3, 0.1), (3, None), (16, 0.1)]


def _shown(kind, n, repeats):
    rng = np.random.default_rng(n)
    return np.mean([_alike(rng, n, kind) for _ in range(repeats)])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_of_adapters_that_are_alike_a_difference_is_rarely_shown(kind):
    repeats = 100
    shown = [_shown(kind, n, repeats) for n in (2, 3, 5, 8, 10, 12, 20, 50, 200)]
    assert max(shown[:4]) == 0, "of fewer than ten rows nothing is said"
    assert np.mean(shown[4:]) <= 0.06 + 2 * np.sqrt(0.05 * 0.95 / (5 * repeats))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_of_adapters_that_are_alike_a_difference_is_shown_in_6_percent_at_most(kind):
    repeats = 3000
    noise = 2 * np.sqrt(0.05 * 0.95 / repeats)
    assert max(_shown(kind, n, repeats) for n in (2, 5, 9, 10, 11, 13, 16, 25, 40, 64, 100, 300, 1000)) <= 0.06 + noise


def test_the_interval_of_a_mean_is_student_s_where_nothing_is_skewed():
    values = np.array([-3.0, -1.0, -0.5, 0.5, 1.0, 3.0]) + 2
    wanted = stats.t.interval(0.95, 5, values.mean(), stats.sem(values))
    assert tuple(ratio_interval(values, np.ones(6))) == pytest.approx(wanted)
    skewed = ratio_interval(np.exp(values), np.ones(6))
    student = stats.t.interval(0.95, 5, np.exp(values).mean(), stats.sem(np.exp(values)))
    assert skewed.low == pytest.approx(student[0])
    assert skewed.high > student[1]


def test_chance_is_that_of_all_ways_to_deal_the_outcomes():
    right = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 1], [1, 1, 1], [1, 0, 1], [0, 0, 0]], dtype=bool)
    dealt = [sum(row) for row in product(*([*row] for row in right))]
    mine = int(right[:, 0].sum())
    wanted = min(1.0, 2 * min(np.mean([d <= mine for d in dealt]), np.mean([d >= mine for d in dealt])))
    assert chance(right[:, 0], right[:, 1:].sum(1), 2) == pytest.approx(wanted)
    a, b = right[:, 0], right[:, 1]
    assert chance(a, b.astype(int), 1) == pytest.approx(mcnemar(a, b))
