r"""Tell whether a budget is better spent on training one seed longer, or on more seeds that are merged.

Soup of ``n`` seeds after ``T`` steps costs what one seed costs after ``n T`` steps. It gains :math:`g` over the mean
seed. The one seed gains :math:`s \ln n`, where :math:`s` is what a seed's validation loss falls by while the steps grow
by a factor of e. So soup is the better one where

.. math:: g > s \ln n.

:math:`s` is wanted between runs that end, each with its learning rate at its lowest, and seen within one run, whose
rate falls meanwhile: much of the fall at the end of a run comes from that. So the loss of a seed is taken for

.. math:: L(t) = a - s \ln S(t) + c\, \eta(t),

with the rate :math:`\eta(t)` over its largest value and the sum of the rates so far, :math:`S(t)`: a run of ``n T``
steps under the same schedule ends at the same rate and at ``n`` times the sum. (Tissue et al., arXiv 2408.11029, take
the fall of the rate into account in a like manner.) Each seed gives an estimate of its own, and the spread of the seeds
the interval. A loss that falls steeply at first, as of a base model that does not know the format yet, is not of that
form, and would make :math:`s` many times too large: the first validations are left out until the rest fit, which an F
test of the mean residuals against those of the seeds decides.

That holds as long as the rows teach something new. A seed that has begun to learn them by heart has a training loss
below its validation loss, and the latter soon falls more slowly, or rises, of which its curve shows nothing yet: 160
rows for 4 epochs gave s = 0.12 (0.04 to 0.19), and after 12 epochs the loss was higher by 0.40. So nobody is told to
train longer there; that fusing is better can still be said, because s is no less than it will be.

Shape legend: ``N`` seeds, ``V`` validations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy  # its statistics are imported when they are used first

from seedlora.scores.intervals import CONFIDENCE_PERCENT, leaves_0_out

#: Validations are used from this part of the steps on: before, the rate still rises and the loss falls otherwise. In
#: the last three quarters alone the rate and the sum of the rates are too much alike to be told apart.
FROM = 0.1
#: Training loss over validation loss below which rows are learnt by heart. It was 0.97 at the end of one epoch of 640
#: rows, after which a seed still gained by more steps, and 0.90 and less in runs at their floor and past it.
BY_HEART = 0.95
FUSE, TRAIN_LONGER, UNKNOWN = "fuse", "train longer", "unknown"


class Estimate(NamedTuple):
    """Hold a number with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def shown(self) -> bool:
        """Return whether the interval leaves 0 out."""
        return leaves_0_out(self.low, self.high)


@dataclass(frozen=True)
class TrainOrFuse:
    """Hold what is known of training longer and of fusing.

    Args:
        verdict: ``fuse``, ``train longer``, or ``unknown`` where the interval of the margin holds 0 or there is none.
        reason: why there is no verdict, for people, unless it is the interval of the margin alone.
        slope: s, in nats per token and e-fold of the steps.
        gain: g, in nats per token.
        margin: g - s ln n: by how much soup beats one seed that is trained n times as long.
    """

    verdict: str
    reason: str = ""
    slope: Estimate | None = None
    gain: Estimate | None = None
    margin: Estimate | None = None


def fall_per_efold(
    steps: Sequence[int], losses: Sequence[Sequence[float]], rate: Callable[[int], float]
) -> Estimate | None:
    """Estimate s from the validation losses of seeds; None where there are too few of them.

    Args:
        steps: optimizer steps after which the seeds were validated, ascending; the last is that of the run's end.
        losses: of each seed then, shape (N, V).
        rate: the learning rate of an optimizer step, counted from 0, in any unit.

    Example:
        >>> fall_per_efold([10, 20, 40], [[3.0, 2.0, 1.0], [4.0, 3.0, 2.0]], lambda step: 1.0)
        Estimate(value=1.4426950408889634, low=1.4426950408889634, high=1.4426950408889634)
    """
    chosen = [i for i, step in enumerate(steps) if step >= FROM * steps[-1]] if steps else []
    if len(losses) < 2 or not chosen:
        return None
    rates = np.array([rate(step) for step in range(steps[-1] + 1)])
    areas, losses_NV = np.cumsum(rates[:-1]), np.array(losses, dtype=float)
    for first in range(len(chosen)):
        part = [steps[i] for i in chosen[first:]]
        columns = [np.ones(len(part)), -np.log(areas[[step - 1 for step in part]])]
        if not np.allclose(rates[part], rates[part[0]]):
            columns.append(rates[part] / rates[:-1].max())
        design_VC = np.stack(columns, axis=1)
        # What was shortened must have validations to spare, or that it fits says nothing.
        if np.linalg.matrix_rank(design_VC) < len(columns) or (first and len(part) == len(columns)):
            return None
        losses_VN = losses_NV[:, chosen[first:]].T
        found_CN = np.linalg.lstsq(design_VC, losses_VN, rcond=None)[0]
        if _fits(losses_VN - design_VC @ found_CN, len(columns)):
            return _mean_of(found_CN[1])
    return None


def _fits(residuals_VN: np.ndarray, columns: int) -> bool:
    """Return whether what all seeds have in common is explained by a fit: no lack of fit at the 5 % level."""
    validations, seeds = residuals_VN.shape
    spare = validations - columns
    common = residuals_VN.mean(1, keepdims=True)
    if not spare or np.abs(residuals_VN).max() < 1e-9:
        return True
    lack = seeds * float((common**2).sum()) / spare
    noise = float(((residuals_VN - common) ** 2).sum()) / (spare * (seeds - 1))
    return lack <= noise * float(scipy.stats.f.ppf(CONFIDENCE_PERCENT / 100, spare, spare * (seeds - 1)))


def _mean_of(values: np.ndarray) -> Estimate:
    """Return the mean of independent values with Student's interval.

    Rounding is no spread: where the values are the same to 12 digits, the interval is their mean.
    """
    mean, n = float(values.mean()), len(values)
    error = float(values.std(ddof=1)) / math.sqrt(n)
    if error < 1e-12 * max(1.0, abs(mean)):
        return Estimate(mean, mean, mean)
    half = error * float(scipy.stats.t.ppf(0.5 + CONFIDENCE_PERCENT / 200, n - 1))
    return Estimate(mean, mean - half, mean + half)


def margin_of(gain: Estimate, slope: Estimate, n: int) -> Estimate:
    r"""Return :math:`g - s \ln n` with its interval, from those of both.

    The distances of the ends from the values add up as standard errors do (MOVER, Zou and Donner, Statistics in
    Medicine 27, 2008), which needs no normal distribution.

    Example:
        >>> margin_of(Estimate(0.5, 0.2, 0.9), Estimate(0.0, 0.0, 0.0), 3)
        Estimate(value=0.5, low=0.2, high=0.9)
    """
    efolds = math.log(n)
    value = gain.value - efolds * slope.value
    below = math.hypot(gain.value - gain.low, efolds * (slope.high - slope.value))
    above = math.hypot(gain.high - gain.value, efolds * (slope.value - slope.low))
    return Estimate(value, value - below, value + above)


def train_or_fuse(
    slope: Estimate | None, gain: Estimate | None, n: int, *, loss_ratio: float | None = None
) -> TrainOrFuse:
    """Compare soup of ``n`` seeds with one seed that is trained ``n`` times as long.

    Args:
        slope: as :func:`fall_per_efold` has it.
        gain: validation loss of the mean seed minus that of soup, on the same rows.
        n: seeds.
        loss_ratio: of the seeds at the end, training loss over validation loss, if it is known.

    Example:
        >>> train_or_fuse(Estimate(0.01, 0.0, 0.02), Estimate(0.1, 0.05, 0.15), 3).verdict
        'fuse'
    """
    if n < 2:
        return TrainOrFuse(UNKNOWN, "there is one seed, and nothing to fuse")
    if gain is None:
        return TrainOrFuse(UNKNOWN, "what soup gains was not measured on validation rows", slope)
    if slope is None:
        return TrainOrFuse(UNKNOWN, "too few validations tell how fast the seeds still improve", None, gain)
    margin = margin_of(gain, slope, n)
    verdict = (FUSE if margin.value > 0 else TRAIN_LONGER) if margin.shown else UNKNOWN
    if verdict != FUSE and loss_ratio is not None and loss_ratio < BY_HEART:
        reason = (
            f"at the end the training loss of the seeds was {loss_ratio:.2f} of their validation loss, so they learn "
            "the rows by heart, and more epochs gain less than the fall so far says, or nothing"
        )
        return TrainOrFuse(UNKNOWN, reason, slope, gain, margin)
    return TrainOrFuse(verdict, "", slope, gain, margin)


def next_step(found: TrainOrFuse) -> str:
    """Say what to do next, of more epochs, more rows, more seeds, more validations, and stopping here."""
    slope, gain = found.slope, found.gain
    if slope is None or gain is None:
        return "Next: several validations of several seeds (--trainer.val_check_interval), on more rows, would tell."
    past = slope.shown and slope.value < 0
    if found.verdict == TRAIN_LONGER:
        return "Next: more epochs, for one seed or for all; fusing pays once the loss of a seed falls more slowly."
    if past or found.reason:
        return (
            "Next: more rows, or fewer epochs (--ensemble.keep best): the seeds are at their lowest loss, or past it."
        )
    if found.verdict == FUSE and slope.shown:
        return "Next: more seeds; the loss of a seed still falls too, so more epochs for all of them."
    if found.verdict == FUSE:
        return "Next: more seeds or more rows; that more epochs would help is not shown."
    if not (gain.shown or slope.shown):
        return "Next: stop here, or take more rows: neither more epochs nor more seeds are shown to help."
    return (
        "Next: more validations (--trainer.val_check_interval), more validation rows or more seeds would tell; "
        "--controls trains the one seed."
    )
