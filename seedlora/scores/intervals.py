"""Intervals and paired tests for adapters scored on the same items."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest

from seedlora.scores.row_scores import RowScores


@dataclass(frozen=True)
class Score:
    """A proportion of ``n`` items with its 95 % Wilson interval."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference:
    """A mean paired difference over ``n`` items with its 95 % bootstrap interval.

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
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


def wilson(correct: np.ndarray) -> Score:
    """The share of right items.

    Args:
        correct: bool, shape (items,); at least one.
    """
    k, n = int(correct.sum()), len(correct)
    interval = binomtest(k, n).proportion_ci(method="wilson")
    return Score(k / n, float(interval.low), float(interval.high), n)


def paired_difference(a: np.ndarray, b: np.ndarray, *, resamples: int = 10_000, seed: int = 0) -> Difference:
    """The mean of ``a - b`` over items, with a percentile bootstrap over items.

    Args:
        a: score of each item, shape (items,).
        b: score of each item from another adapter, or the mean of several.
        resamples: bootstrap samples.
        seed: of the resampling; the same input gives the same interval.
    """
    differences = a.astype(float) - b.astype(float)
    n = len(differences)
    # Resampling n items with replacement only needs how often each distinct difference is drawn.
    values, counts = np.unique(differences, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(n, counts / n, size=resamples)
    low, high = np.quantile(draws @ values / n, [0.025, 0.975])
    binary = bool(np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all())
    return Difference(float(differences.mean()), float(low), float(high), n, mcnemar(a > 0, b > 0) if binary else None)


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Exact two-sided McNemar test: are items that only one side gets right split evenly? 1 if there are none."""
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for how many there are, by Holm's step-down rule, in the order given."""
    adjusted, largest, n = [0.0] * len(p_values), 0.0, len(p_values)
    for rank, i in enumerate(sorted(range(n), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (n - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def adjust_over_tasks(tested: Iterable[tuple[Hashable, dict[str, Any]]]) -> None:
    """Add ``p_value_holm`` to differences that have a ``p_value``: one family are those of the same two adapters.

    Args:
        tested: what is compared with what, and the difference on one task.
    """
    families: dict[Hashable, list[dict[str, Any]]] = {}
    for compared, difference in tested:
        if difference["p_value"] is not None:
            families.setdefault(compared, []).append(difference)
    for family in families.values():
        for difference, p_value in zip(family, holm([row["p_value"] for row in family]), strict=True):
            difference["p_value_holm"] = p_value


def sample_losses(scores: Mapping[str, RowScores]) -> dict[str, Any]:
    """Loss per token of each adapter on one sample of rows, as plain data, with 95 % bootstrap intervals over rows.

    All are of the same resamples. A loss that is not finite is left out.
    """
    tokens = next(iter(scores.values())).tokens.double().numpy()
    draws = _resampled_rows(len(tokens))
    found = {}
    for label, row in scores.items():
        if is_finite(row):
            low, high = _interval(draws, row.losses.double().numpy(), tokens)
            found[label] = {"value": row.loss, "low": low, "high": high}
    return {"rows": len(tokens), "tokens": int(tokens.sum()), "losses": found}


def is_finite(row: RowScores) -> bool:
    """Whether the loss is a number that can be compared, and written as JSON."""
    return math.isfinite(row.loss)


def loss_difference(a: RowScores, b: RowScores) -> dict[str, Any]:
    r"""Loss per token of ``a`` minus ``b`` with its 95 % bootstrap interval over rows.

    A resample has its own number of tokens, so it is a ratio of sums:

    .. math:: \frac{\sum_{i \in S} (l^a_i - l^b_i)}{\sum_{i \in S} t_i}

    Args:
        a: on the same rows as ``b``.
        b: what it is compared with.
    """
    differences, tokens = (a.losses.double() - b.losses.double()).numpy(), a.tokens.double().numpy()
    low, high = _interval(_resampled_rows(len(tokens)), differences, tokens)
    value = float(differences.sum() / tokens.sum())
    return {"value": value, "low": low, "high": high, "n": len(tokens), "shown": low > 0 or high < 0}


def _resampled_rows(n: int, *, resamples: int = 10_000, seed: int = 0) -> np.ndarray:
    """How often each of ``n`` rows is in each resample: at most ``resamples`` of them, for the memory, at least 200."""
    size = max(200, min(resamples, 20_000_000 // n))
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=size)


def _interval(draws: np.ndarray, sums: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    """Of a sum over rows per token."""
    low, high = np.quantile((draws @ sums) / (draws @ tokens), [0.025, 0.975]).tolist()
    return low, high
