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
    ratio_intervals,
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
    np.testing.assert_allclose([found["low"], found["high"]], np.quantile(draws, [0.025, 0.975]), atol=0.025)
    # One difference per token, whatever the row's length: no resample can say otherwise.
    c = RowScores(second + 0.25 * torch.tensor(tokens), b.correct, b.tokens)
    same = loss_difference(c, b)
    assert (same["low"], same["high"]) == pytest.approx((0.25, 0.25))


def _normal(rng, shape):
    return rng.normal(size=shape), np.ones(shape)


def _losses(rng, shape):
    """Losses of two adapters on rows that are hard or easy for both, and long or short."""
    tokens, hard = rng.integers(1, 60, size=shape), rng.lognormal(size=shape)
    return tokens * (hard + rng.normal(0, 0.3, size=shape)) - tokens * (hard + rng.normal(0, 0.3, size=shape)), tokens


def _losses_against_a_mean(rng, shape):
    """The skewed losses of an adapter against the mean of sixteen others."""
    tokens = rng.integers(1, 60, size=shape)
    return tokens * (rng.exponential(size=shape) - rng.gamma(16, 1 / 16, size=shape)), tokens


def _skewed(rng, shape):
    return rng.lognormal(size=shape) - np.exp(0.5), np.ones(shape)


def _skewed_in_rows_of_all_lengths(rng, shape):
    tokens = np.ceil(rng.lognormal(4, 0.8, size=shape))
    return tokens * (rng.lognormal(0, 0.5, size=shape) - np.exp(0.125)), tokens


def _few_differ(rng, shape):
    """Judged scores of halves, alike for most rows."""
    return rng.choice([-1, -0.5, 0.5, 1], size=shape) * (rng.random(shape) < 0.2), np.ones(shape)


def _few_differ_by_much(rng, shape):
    return rng.normal(size=shape) * np.where(rng.random(shape) < 0.02, 10, 0.1), np.ones(shape)


REAL = [
    _normal,
    _losses,
    _losses_against_a_mean,
    _skewed,
    _skewed_in_rows_of_all_lengths,
    _few_differ,
    _few_differ_by_much,
]


def _left_out(kind, n, repeats):
    """How often the interval of so many rows leaves out the truth, 0."""
    rng, out = np.random.default_rng(n), 0
    for _ in range(10):
        low, high = ratio_intervals(*kind(rng, (repeats // 10, n)))
        out += int(((low > 0) | (high < 0)).sum())
    return out / repeats


def _noise(repeats):
    return 2 * np.sqrt(0.05 * 0.95 / repeats)


@pytest.mark.parametrize("kind", REAL)
def test_where_there_is_no_difference_an_interval_leaves_0_out_in_6_percent_at_most(kind):
    for n in (10, 12, 16, 30, 50, 100, 300):
        repeats = min(10_000, 300_000 // n)
        assert _left_out(kind, n, repeats) <= 0.06 + _noise(repeats), n


@pytest.mark.slow
@pytest.mark.parametrize("kind", REAL)
def test_the_same_with_40_000_samples_of_every_size(kind):
    for n in (10, 11, 12, 13, 14, 16, 20, 25, 30, 40, 50, 64, 100, 200, 500, 1000):
        assert _left_out(kind, n, 40_000) <= 0.06 + _noise(40_000), n


#: Others beside the first adapter, and the share of items that each gets right; None for easy items and hard ones.
COUNTS = [(1, 0.5), (1, 0.05), (3, 0.02), (3, 0.1), (3, None), (16, 0.1)]


def _shown(kind, n, repeats):
    """How often a difference is shown between adapters that get the same share right."""
    rng, (others, share), shown = np.random.default_rng(n), kind, 0
    for _ in range(repeats):
        right = rng.random((n, 1 + others)) < (rng.beta(0.5, 0.5, size=(n, 1)) if share is None else share)
        shown += paired_difference(right[:, 0], right[:, 1:].mean(1), of=others).shown
    return shown / repeats


@pytest.mark.parametrize("kind", COUNTS, ids=str)
def test_of_adapters_that_are_alike_a_difference_is_rarely_shown(kind):
    repeats = 100
    assert max(_shown(kind, n, repeats) for n in (10, 12, 20, 50, 200)) <= 0.06 + 2 * _noise(repeats)


@pytest.mark.slow
@pytest.mark.parametrize("kind", COUNTS, ids=str)
def test_of_adapters_that_are_alike_a_difference_is_shown_in_6_percent_at_most(kind):
    for n in (10, 11, 13, 16, 25, 40, 64, 100, 300, 1000):
        assert _shown(kind, n, 3000) <= 0.06 + _noise(3000), n


@pytest.mark.parametrize("n", [2, 3, 5, 8, 9])
def test_of_fewer_than_ten_rows_nothing_is_shown(n):
    assert not paired_difference(np.ones(n), np.zeros(n)).shown
    assert not paired_difference(np.arange(n) + 1.0, np.zeros(n)).shown
    tokens, right = torch.full((n,), 4), torch.zeros(n, dtype=torch.bool)
    a, b = (RowScores(losses * tokens, right, tokens) for losses in (torch.full((n,), 1.5), torch.ones(n)))
    assert not loss_difference(a, b)["shown"]


def test_the_interval_of_a_mean_is_student_s_where_nothing_is_skewed():
    values = np.array([-3.0, -1.0, -0.5, 0.5, 1.0, 3.0]) + 2
    wanted = stats.t.interval(0.95, 5 / 3, values.mean(), stats.sem(values))
    assert tuple(ratio_interval(values, np.ones(6))) == pytest.approx(wanted)
    skewed = ratio_interval(np.exp(values), np.ones(6))
    student = stats.t.interval(0.95, 5 / 3, np.exp(values).mean(), stats.sem(np.exp(values)))
    assert skewed.low == pytest.approx(student[0])
    assert skewed.high > student[1]


def test_several_samples_at_once_are_each_alone():
    rng = np.random.default_rng(0)
    values, weights = rng.lognormal(size=(3, 12)), rng.integers(1, 9, size=(3, 12))
    values[1] = weights[1]  # a ratio without spread
    alone = [ratio_interval(v, w) for v, w in zip(values, weights, strict=True)]
    np.testing.assert_array_equal(np.transpose(ratio_intervals(values, weights)), alone)
    assert alone[1] == (1, 1)


def test_chance_is_that_of_all_ways_to_deal_the_outcomes():
    right = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 1], [1, 1, 1], [1, 0, 1], [0, 0, 0]], dtype=bool)
    dealt = [sum(row) for row in product(*([*row] for row in right))]
    mine = int(right[:, 0].sum())
    wanted = min(1.0, 2 * min(np.mean([d <= mine for d in dealt]), np.mean([d >= mine for d in dealt])))
    assert chance(right[:, 0], right[:, 1:].sum(1), 2) == pytest.approx(wanted)
    a, b = right[:, 0], right[:, 1]
    assert chance(a, b.astype(int), 1) == pytest.approx(mcnemar(a, b))
