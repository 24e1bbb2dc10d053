"""Intervals and paired tests for adapters scored on the same items."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from seedlora.records.report import PairedDifference
from seedlora.records.results import DifferenceRecord, LossRecord, SampleLosses, ScoreRecord
from seedlora.records.selection import LossDifference
from seedlora.scores.row_scores import RowScores

#: How sure all intervals are.
CONFIDENCE_PERCENT = 95
_ENDS = (0.025, 0.975)


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
    """Hold a mean paired difference over ``n`` items with its 95 % bootstrap interval.

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
    from scipy.stats import binomtest  # half a second, which only who computes statistics pays

    k, n = int(correct.sum()), len(correct)
    interval = binomtest(k, n).proportion_ci(method="wilson")
    return Score(k / n, float(interval.low), float(interval.high), n)


def paired_difference(a: np.ndarray, b: np.ndarray, *, resamples: int = 10_000, seed: int = 0) -> Difference:
    """Return the mean of ``a - b`` over items, with a percentile bootstrap over items.

    Args:
        a: score of each item, shape (items,).
        b: score of each item from another adapter, or the mean of several.
        resamples: bootstrap samples.
        seed: of the resampling; the same input gives the same interval.

    Example:
        >>> a, b = np.arange(100) < 60, np.arange(100) < 50
        >>> paired_difference(a, b)
        Difference(value=0.1, low=0.05, high=0.16, n=100, p_value=0.001953125)
    """
    differences = a.astype(float) - b.astype(float)
    n = len(differences)
    # Resampling n items with replacement only needs how often each distinct difference is drawn.
    values, counts = np.unique(differences, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(n, counts / n, size=resamples)
    ends = percentiles(draws @ values / n)
    binary = bool(np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all())
    return Difference(float(differences.mean()), *ends, n, mcnemar(a > 0, b > 0) if binary else None)


class Ends(NamedTuple):
    """Hold the two ends of an interval."""

    low: float
    high: float


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
    from scipy.stats import binomtest

    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


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
    """Return the loss per token of each adapter on one sample of rows, with 95 % bootstrap intervals over rows.

    All intervals are of the same resamples. A loss that is not finite is left out.

    Example:
        >>> import torch
        >>> tokens, right = torch.full((50,), 4), torch.zeros(50, dtype=torch.bool)
        >>> sample_losses({"soup": RowScores(1.5 * tokens, right, tokens)})
        {'rows': 50, 'tokens': 200, 'losses': {'soup': {'value': 1.5, 'low': 1.5, 'high': 1.5}}}
    """
    tokens = next(iter(scores.values())).tokens.double().numpy()
    draws = _resampled_rows(len(tokens))
    found: dict[str, LossRecord] = {}
    for label, row in scores.items():
        if is_finite(row):
            low, high = _interval(draws, row.losses.double().numpy(), tokens)
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
    r"""Return the loss per token of ``a`` minus that of ``b`` with its 95 % bootstrap interval over rows.

    A resample has its own number of tokens, so it is a ratio of sums:

    .. math:: \frac{\sum_{i \in S} (l^a_i - l^b_i)}{\sum_{i \in S} t_i}

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
    low, high = _interval(_resampled_rows(len(tokens)), differences, tokens)
    value = float(differences.sum() / tokens.sum())
    return {"value": value, "low": low, "high": high, "n": len(tokens), "shown": leaves_0_out(low, high)}


def _resampled_rows(n: int, *, resamples: int = 10_000, seed: int = 0) -> np.ndarray:
    """Count how often each of ``n`` rows is in each resample.

    There are ``resamples`` of them, fewer where so many would not fit into memory, and 200 at least.
    """
    size = max(200, min(resamples, 20_000_000 // n))
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=size)


def _interval(draws: np.ndarray, sums: np.ndarray, tokens: np.ndarray) -> Ends:
    """Return the interval of a sum over rows, per token."""
    return percentiles((draws @ sums) / (draws @ tokens))
