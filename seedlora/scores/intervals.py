"""Intervals and paired tests for adapters scored on the same items."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy  # its statistics, half a second, are imported when they are used first

from seedlora.records.report import PairedDifference
from seedlora.records.results import DifferenceRecord, LossRecord, SampleLosses, ScoreRecord
from seedlora.records.selection import LossDifference
from seedlora.scores.row_scores import RowScores

#: How sure all intervals are.
CONFIDENCE_PERCENT = 95
_ENDS = (0.025, 0.975)
#: Items from which on a difference may be shown: of fewer the spread is not known well enough.
FEWEST = 10


@dataclass(frozen=True)
class Score:
    """Hold a share of ``n`` items with its 95 % Wilson interval."""

    value: float
    low: float
    high: float
    n: int

    def to_record(self) -> ScoreRecord:
        """Return the score as plain data."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}

    @staticmethod
    def from_record(record: ScoreRecord) -> Score:
        """Return the score that a file holds."""
        return Score(record["value"], record["low"], record["high"], record["n"])


@dataclass(frozen=True)
class Difference:
    """Hold a mean paired difference over ``n`` items with its 95 % interval.

    Args:
        value: mean difference.
        low: end of the interval.
        high: end of the interval.
        n: items.
        p_value: of the exact McNemar test, where both sides are right or wrong on each item; else ``None``.
    """

    value: float
    low: float
    high: float
    n: int
    p_value: float | None = None

    @property
    def shown(self) -> bool:
        """Return whether the interval leaves 0 out."""
        return leaves_0_out(self.low, self.high)

    def to_record(self) -> DifferenceRecord:
        """Return the difference as plain data."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n, "p_value": self.p_value}

    @staticmethod
    def from_record(record: DifferenceRecord) -> Difference:
        """Return the difference that a file holds."""
        return Difference(record["value"], record["low"], record["high"], record["n"], record["p_value"])


def leaves_0_out(low: float, high: float) -> bool:
    """Return whether an interval leaves 0 out, so that a difference counts as shown.

    Example:
        >>> leaves_0_out(0.1, 0.4), leaves_0_out(-0.1, 0.4)
        (True, False)
    """
    return low > 0 or high < 0


def wilson(correct: np.ndarray) -> Score:
    """Return the share of right items with its interval.

    Args:
        correct: bool, shape (items,); at least one.

    Example:
        >>> wilson(np.array([True] * 37 + [False] * 63))
        Score(value=0.37, low=0.28182360534324535, high=0.4677947041905709, n=100)
    """
    k, n = int(correct.sum()), len(correct)
    interval = scipy.stats.binomtest(k, n).proportion_ci(method="wilson")
    return Score(k / n, float(interval.low), float(interval.high), n)


def paired_difference(a: np.ndarray, b: np.ndarray, *, of: int = 1) -> Difference:
    """Return the mean of ``a - b`` over items with its interval, which leaves 0 out only where that is no chance.

    The interval is :func:`ratio_interval`'s. It is widened to 0 where there are fewer than :data:`FEWEST` items, and
    where both sides are right or wrong and :func:`chance` is 5 % or more.

    Args:
        a: score of each item, shape (items,).
        b: score of each item from another adapter, or the mean of several.
        of: how many adapters ``b`` is the mean of.

    Example:
        >>> a, b = np.arange(100) < 60, np.arange(100) < 50
        >>> found = paired_difference(a, b)
        >>> round(found.low, 2), found.value, round(found.high, 2), found.shown
        (0.04, 0.1, 0.18, True)
    """
    differences = a.astype(float) - b.astype(float)
    right = np.rint(of * b.astype(float))
    counts = bool(np.isin(a, (0, 1)).all() and np.allclose(right, of * b.astype(float), atol=1e-6))
    low, high = ratio_interval(differences, np.ones(len(differences)))
    if counts:
        low, high = max(low, -1.0), min(high, 1.0)
    if len(differences) < FEWEST or (counts and chance(a > 0, right.astype(int), of) >= 1 - CONFIDENCE_PERCENT / 100):
        low, high = min(low, 0.0), max(high, 0.0)
    p_value = mcnemar(a > 0, b > 0) if counts and of == 1 else None
    return Difference(float(differences.mean()), low, high, len(differences), p_value)


def chance(a: np.ndarray, right: np.ndarray, of: int) -> float:
    """Return how often chance alone takes one of ``1 + of`` adapters as far from the others' mean, on either side.

    If the adapters are alike, each is equally likely to be among those that get an item right: the number of items that
    the first gets right is a sum of as many draws. For two adapters it is McNemar's exact test.

    Args:
        a: whether the first adapter is right, shape (items,).
        right: how many of the others are.
        of: how many others there are.

    Example:
        >>> round(chance(np.array([True] * 5 + [False]), np.array([0] * 5 + [1]), 1), 5)
        0.21875
    """
    together = right + a
    likely, decided = np.ones(1), int((together == of + 1).sum())
    for k in range(1, of + 1):
        items = int((together == k).sum())
        likely = np.convolve(likely, scipy.stats.binom.pmf(np.arange(items + 1), items, k / (of + 1)))
    won = int(a.sum()) - decided
    return min(1.0, 2 * float(min(likely[: won + 1].sum(), likely[won:].sum())))


class Ends(NamedTuple):
    """Hold the two ends of an interval."""

    low: float
    high: float


def ratio_interval(values: np.ndarray, weights: np.ndarray) -> Ends:
    r"""Return the 95 % interval of a sum of values over a sum of weights, as loss per token or the mean of items.

    .. math:: \frac{\sum_i v_i}{\sum_i w_i}

    Args:
        values: of the items; not divided by their weights.
        weights: of the items, for example their tokens; all above 0.

    Example:
        >>> [round(end, 3) for end in ratio_interval(np.array([1.0, 2.0, 3.0, 4.0]), np.ones(4))]
        [-5.702, 10.702]
    """
    lows, highs = ratio_intervals(values[None], weights[None])
    return Ends(float(lows[0]), float(highs[0]))


def ratio_intervals(values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""Return :func:`ratio_interval` of several samples at once: all low ends, and all high ends, of shape (samples,).

    Each is Student's interval, and Hall's, which follows the skewness, and reaches as far as the wider one on a side:
    where most items differ by little and a few by much, Student's alone would be too short. An item of much weight
    counts for more than one, so that there are fewer degrees of freedom. Of these a third is taken: Student's are those
    of a normal distribution, and the spread of skewed losses is known as badly as from a third of the rows. So at
    n from :data:`FEWEST` to 1,000 at most 6 % of the intervals leave out the truth for normal, heavy-tailed and
    log-normal items with a log-sd of up to 1; from about 100 rows on the third changes an end by 3 % at most.

    Args:
        values: shape (samples, items).
        weights: likewise.

    References:
        Hall, "On the removal of skewness by transformation", J. R. Stat. Soc. B 54, 1992.
    """
    n, totals = values.shape[1], weights.sum(1)
    share, mean = weights / totals[:, None], values.sum(1) / totals
    if n == 1:
        return mean, mean
    # Of a row with a large share the residual is too small: the mean follows it.
    residuals = (values - mean[:, None] * weights) * n / totals[:, None] / np.sqrt(1 - share)
    spread = np.sqrt((residuals**2).mean(1))
    spread = np.where(spread <= 1e-12 * np.maximum(1.0, np.abs(mean)), 0.0, spread)
    skewness = (residuals**3).mean(1) / np.where(spread > 0, spread, 1.0) ** 3
    freedom = np.maximum((1 / (share**2).sum(1) - 1) / 3, 0.5)
    reach = scipy.stats.t.ppf(0.5 + CONFIDENCE_PERCENT / 200, freedom) / n**0.5

    def bent(x: np.ndarray) -> np.ndarray:
        skewed = np.where(np.abs(skewness) < 1e-6, 1e-6, skewness)
        return 3 / skewed * (np.cbrt(1 + skewed * (x - skewed / (6 * n))) - 1)

    return mean - spread * np.maximum(reach, bent(reach)), mean + spread * np.maximum(reach, -bent(-reach))


def percentiles(draws: np.ndarray) -> Ends:
    """Return the interval between the percentiles of bootstrap draws that :data:`CONFIDENCE_PERCENT` lie between.

    Example:
        >>> percentiles(np.arange(1001))
        Ends(low=25.0, high=975.0)
    """
    low, high = np.quantile(draws, _ENDS).tolist()
    return Ends(low, high)


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Return the p-value of the exact two-sided McNemar test.

    It asks whether the items that only one side gets right are split evenly; 1 if there are none.

    Example:
        >>> a = np.array([True] * 5 + [False] + [True] * 30)  # 5 against 1, and 30 alike
        >>> mcnemar(a, np.array([False] * 5 + [True] * 31))
        0.21875
    """
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return float(scipy.stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for how many there are, by Holm's step-down rule; they stay in the order given.

    Example:
        >>> holm([0.03, 0.01, 0.02])
        [0.04, 0.03, 0.04]
    """
    adjusted, largest, n = [0.0] * len(p_values), 0.0, len(p_values)
    for rank, i in enumerate(sorted(range(n), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (n - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def adjust_over_tasks(tested: Iterable[tuple[Hashable, DifferenceRecord | PairedDifference]]) -> None:
    """Add ``p_value_holm`` to differences that have a ``p_value``: those of the same two adapters are one family.

    Args:
        tested: what is compared with what, and the difference on one task.

    Example:
        >>> rows = [{"p_value": 0.02}, {"p_value": 0.03}, {"p_value": None}]
        >>> adjust_over_tasks((("fused", "soup"), row) for row in rows)
        >>> rows
        [{'p_value': 0.02, 'p_value_holm': 0.04}, {'p_value': 0.03, 'p_value_holm': 0.04}, {'p_value': None}]
    """
    families: dict[Hashable, list[tuple[float, DifferenceRecord | PairedDifference]]] = {}
    for compared, difference in tested:
        if (p_value := difference["p_value"]) is not None:
            families.setdefault(compared, []).append((p_value, difference))
    for family in families.values():
        for (_, difference), adjusted in zip(family, holm([p_value for p_value, _ in family]), strict=True):
            difference["p_value_holm"] = adjusted


def sample_losses(scores: Mapping[str, RowScores]) -> SampleLosses:
    """Return the loss per token of each adapter on one sample of rows, with 95 % intervals over rows.

    A loss that is not finite is left out.

    Example:
        >>> import torch
        >>> tokens, right = torch.full((50,), 4), torch.zeros(50, dtype=torch.bool)
        >>> sample_losses({"soup": RowScores(1.5 * tokens, right, tokens)})
        {'rows': 50, 'tokens': 200, 'losses': {'soup': {'value': 1.5, 'low': 1.5, 'high': 1.5}}}
    """
    tokens = next(iter(scores.values())).tokens.double().numpy()
    found: dict[str, LossRecord] = {}
    for label, row in scores.items():
        if is_finite(row):
            low, high = ratio_interval(row.losses.double().numpy(), tokens)
            found[label] = {"value": row.loss, "low": low, "high": high}
    return {"rows": len(tokens), "tokens": int(tokens.sum()), "losses": found}


def is_finite(row: RowScores) -> bool:
    """Return whether the loss is a number that can be compared, and written as JSON.

    Example:
        >>> import torch
        >>> is_finite(RowScores(torch.tensor([3.0, math.nan]), torch.tensor([True, False]), torch.tensor([1, 7])))
        False
    """
    return math.isfinite(row.loss)


def loss_difference(a: RowScores, b: RowScores) -> LossDifference:
    r"""Return the loss per token of ``a`` minus that of ``b`` with its 95 % interval over rows.

    It is a ratio of sums, and of fewer than :data:`FEWEST` rows nothing is shown:

    .. math:: \frac{\sum_i (l^a_i - l^b_i)}{\sum_i t_i}

    Args:
        a: on the same rows as ``b``.
        b: what it is compared with.

    Example:
        >>> import torch
        >>> tokens, right = torch.full((50,), 4), torch.zeros(50, dtype=torch.bool)
        >>> a, b = (RowScores(losses * tokens, right, tokens) for losses in (torch.full((50,), 1.5), torch.ones(50)))
        >>> loss_difference(a, b)
        {'value': 0.5, 'low': 0.5, 'high': 0.5, 'n': 50, 'shown': True}
    """
    differences, tokens = (a.losses.double() - b.losses.double()).numpy(), a.tokens.double().numpy()
    low, high = ratio_interval(differences, tokens)
    if len(tokens) < FEWEST:
        low, high = min(low, 0.0), max(high, 0.0)
    value = float(differences.sum() / tokens.sum())
    return {"value": value, "low": low, "high": high, "n": len(tokens), "shown": leaves_0_out(low, high)}


def mean_score(values: np.ndarray) -> Score:
    """Return the mean of measures from 0 to 1 with Student's 95 % interval, which one item leaves at 0 to 1.

    Args:
        values: shape (items,); at least one.

    Example:
        >>> mean_score(np.array([0.0, 0.5, 1.0, 0.5]))
        Score(value=0.5, low=0.0, high=1.0, n=4)
    """
    n, mean = len(values), float(values.mean())
    if n < 2:
        return Score(mean, 0.0, 1.0, n)
    half = float(scipy.stats.t.ppf(_ENDS[1], n - 1)) * float(values.std(ddof=1)) / n**0.5
    return Score(mean, max(0.0, mean - half), min(1.0, mean + half), n)
