"""Train longer, or fuse: the laws of the comparison, and how often it is right where the truth is known."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest

from seedlora.scores.train_or_fuse import (
    FUSE,
    TRAIN_LONGER,
    UNKNOWN,
    Estimate,
    fall_per_efold,
    margin_of,
    next_step,
    train_or_fuse,
)
from seedlora.training.schedule import learning_rate_factor

T, STEPS = 200, range(20, 201, 20)
RATES = {
    name: partial(learning_rate_factor, schedule=name, warmup=10, total=T) for name in ("constant", "cosine", "linear")
}


def curves(rate, slope, *, seeds=3, noise=0.0, fall=0.0, rng=None):
    """Losses of seeds that fall by ``slope`` per e-fold of the rates so far, and by ``fall`` with the rate."""
    areas = np.cumsum([rate(step) for step in range(T)])
    clean = [5 - slope * math.log(areas[step - 1]) + fall * rate(step) for step in STEPS]
    rng = rng or np.random.default_rng(0)
    return [(np.array(clean) + i + noise * rng.standard_normal(len(clean))).tolist() for i in range(seeds)]


@pytest.mark.parametrize("schedule", RATES)
@pytest.mark.parametrize("slope", [0.2, 0.0, -0.1])
def test_the_fall_is_found_whatever_the_falling_rate_does_to_the_loss(schedule, slope):
    rate = RATES[schedule]
    found = fall_per_efold(list(STEPS), curves(rate, slope, fall=0.0 if schedule == "constant" else 0.7), rate)
    assert found == pytest.approx((slope, slope, slope), abs=1e-9)


def test_a_run_that_is_n_times_as_long_ends_lower_by_the_fall_times_its_efolds():
    """The law that the sentence rests on: the sum of the rates grows n-fold, and the rate ends where it did."""
    for schedule in RATES:
        short = RATES[schedule]
        long = partial(learning_rate_factor, schedule=schedule, warmup=30, total=3 * T)
        areas = [sum(map(rate, range(steps))) for rate, steps in ((short, T), (long, 3 * T))]
        assert areas[1] / areas[0] == pytest.approx(3, rel=0.01)
        assert long(3 * T) == short(T)


def test_neither_the_level_of_the_losses_nor_the_unit_of_steps_and_rates_matters():
    rate, rng = RATES["cosine"], np.random.default_rng(1)
    losses = curves(rate, 0.1, noise=0.02, rng=rng)
    found = fall_per_efold(list(STEPS), losses, rate)
    assert fall_per_efold(list(STEPS), (np.array(losses) + 3).tolist(), rate) == pytest.approx(found)
    assert fall_per_efold(list(STEPS), (np.array(losses) * 2).tolist(), rate) == pytest.approx([2 * x for x in found])
    assert fall_per_efold(list(STEPS), losses, lambda step: 1e-4 * rate(step)) == pytest.approx(found)
    assert fall_per_efold(list(STEPS), losses[::-1], rate) == pytest.approx(found)


@pytest.mark.parametrize(
    ("steps", "seeds", "schedule"),
    [([], 3, "constant"), ([200], 3, "constant"), ([100, 200], 3, "cosine"), (list(STEPS), 1, "cosine")],
)
def test_too_few_validations_or_seeds_say_nothing(steps, seeds, schedule):
    losses = [[2.0] * len(steps)] * seeds
    assert fall_per_efold(steps, losses, RATES[schedule]) is None


def test_the_interval_of_the_fall_holds_the_truth_as_often_as_it_says():
    rate, rng = RATES["cosine"], np.random.default_rng(0)
    drawn = [fall_per_efold(list(STEPS), curves(rate, 0.1, noise=0.05, fall=0.3, rng=rng), rate) for _ in range(400)]
    assert 0.92 < np.mean([found.low < 0.1 < found.high for found in drawn if found is not None]) < 0.98
    assert drawn.count(None) < 4


def test_a_steep_start_does_not_count_as_progress():
    """A base model that does not know the format falls by 2 nats at once, and then has its floor."""
    rng = np.random.default_rng(0)
    steps = list(range(5, 61, 5))
    losses = [[3.4 + 4 * math.exp(-step / 4) + 0.005 * rng.standard_normal() for step in steps] for _ in range(3)]
    rate = partial(learning_rate_factor, schedule="cosine", warmup=3, total=steps[-1])
    slope = fall_per_efold(steps, losses, rate)
    areas = np.cumsum([rate(step) for step in range(steps[-1])])
    design = [[1.0, -math.log(areas[step - 1]), rate(step)] for step in steps]
    plain = np.linalg.lstsq(np.array(design), np.array(losses).T, rcond=None)[0][1].mean()
    assert plain > 0.5
    assert abs(slope.value) < 0.2 * plain


def test_the_verdict_is_seldom_wrong_where_the_truth_is_known():
    """Gains from 0 to 0.2 against falls from 0 to 0.2, both measured with noise: of those judged, 5 % may be wrong."""
    rng, rate, judged, wrong = np.random.default_rng(0), RATES["cosine"], 0, 0
    for _ in range(400):
        slope, gain = rng.uniform(0, 0.2, size=2)
        measured = gain + 0.01 * rng.standard_normal()
        found = train_or_fuse(
            fall_per_efold(list(STEPS), curves(rate, slope, noise=0.01, fall=0.3, rng=rng), rate),
            Estimate(measured, measured - 0.02, measured + 0.02),
            3,
        )
        if found.verdict != UNKNOWN:
            judged += 1
            wrong += (found.verdict == FUSE) != (gain > slope * math.log(3))
    assert judged > 100
    assert wrong <= 0.05 * judged


def test_the_verdict_follows_the_margin():
    flat, falls = Estimate(0.0, -0.01, 0.01), Estimate(0.2, 0.19, 0.21)
    gain = Estimate(0.1, 0.08, 0.12)
    assert train_or_fuse(flat, gain, 3).verdict == FUSE
    assert train_or_fuse(falls, gain, 3).verdict == TRAIN_LONGER
    # the same seeds, of which more would be trained for less than one e-fold: 0.1 against 0.2 ln 1.6
    assert train_or_fuse(Estimate(0.09, 0.0, 0.18), gain, 3).verdict == UNKNOWN
    found = margin_of(gain, falls, 3)
    assert found.value == pytest.approx(0.1 - 0.2 * math.log(3))
    assert found.low < found.value < found.high
    # an exact slope leaves the interval of the gain, an exact gain that of the slope
    assert margin_of(gain, Estimate(0.2, 0.2, 0.2), 3)[1:] == pytest.approx([x - 0.2 * math.log(3) for x in gain[1:]])
    exact = margin_of(Estimate(0.1, 0.1, 0.1), falls, 3)
    assert exact[1:] == pytest.approx([0.1 - 0.21 * math.log(3), 0.1 - 0.19 * math.log(3)])
    # more seeds at the same gain ask more of it
    margins = [train_or_fuse(falls, gain, n).margin.value for n in (2, 3, 8)]
    assert margins == sorted(margins, reverse=True)


def test_nobody_is_told_to_train_longer_on_rows_that_are_learnt_by_heart():
    falls, flat, gain = Estimate(0.2, 0.19, 0.21), Estimate(0.0, -0.01, 0.01), Estimate(0.1, 0.08, 0.12)
    found = train_or_fuse(falls, gain, 3, loss_ratio=0.5)
    assert (found.verdict, found.margin) == (UNKNOWN, margin_of(gain, falls, 3))
    assert "the training loss of the seeds was 0.50 of their validation loss" in found.reason
    assert "more rows, or fewer epochs" in next_step(found)
    assert train_or_fuse(falls, gain, 3, loss_ratio=0.97).verdict == TRAIN_LONGER
    # that fusing is better can be said: the fall is no less than it will be
    assert train_or_fuse(flat, gain, 3, loss_ratio=0.5).verdict == FUSE


@pytest.mark.parametrize(
    ("slope", "gain", "n", "reason"),
    [
        (Estimate(0, 0, 0), Estimate(0, 0, 0), 1, "there is one seed, and nothing to fuse"),
        (Estimate(0, 0, 0), None, 3, "what soup gains was not measured on validation rows"),
        (None, Estimate(0, 0, 0), 3, "too few validations tell how fast the seeds still improve"),
    ],
)
def test_what_is_not_known_is_said(slope, gain, n, reason):
    found = train_or_fuse(slope, gain, n)
    assert (found.verdict, found.reason, found.margin) == (UNKNOWN, reason, None)


@pytest.mark.parametrize(
    ("slope", "gain", "word"),
    [
        ((0.3, 0.28, 0.32), (0.05, 0.03, 0.07), "more epochs, for one seed or for all"),
        ((0.02, 0.01, 0.03), (0.2, 0.15, 0.25), "more seeds; the loss of a seed still falls too"),
        ((0.0, -0.02, 0.02), (0.2, 0.15, 0.25), "more seeds or more rows"),
        ((-0.1, -0.15, -0.05), (0.2, 0.15, 0.25), "more rows, or fewer epochs"),
        ((0.0, -0.02, 0.02), (0.0, -0.03, 0.03), "stop here"),
        ((0.05, 0.01, 0.09), (0.05, 0.01, 0.09), "more validations"),
    ],
)
def test_what_to_do_next(slope, gain, word):
    assert f"Next: {word}" in next_step(train_or_fuse(Estimate(*slope), Estimate(*gain), 3))
