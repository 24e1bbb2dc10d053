"""Steps that settle entries on which the adapters disagree; each works on any block of entries.

Shape legend: ``N`` adapters, ``...`` entries of one block.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def elect_sign(values: Float[Tensor, "N ..."]) -> Float[Tensor, " ..."]:
    """Return the sign of the sum over the adapters, +1 or -1; a sum of exactly zero elects +1."""
    total = values.sum(0)
    return torch.ones_like(total).copysign_(total + 0.0)  # + 0.0 turns -0 into 0


def disjoint_mean(
    values: Float[Tensor, "N ..."],
    sign: Float[Tensor, " ..."],
    *,
    weights: Float[Tensor, " N"] | None = None,
) -> Float[Tensor, " ..."]:
    """Return the (weighted) mean of the entries that have the given sign; zeros take no part, and 0 where
    none has it.
    """
    agreeing = (values * sign).relu_()  # magnitudes of those that agree
    if weights is None:
        total, share = agreeing.sum(0), agreeing.sign_().sum(0)
        return (total * sign).div_(share.clamp_min_(1))
    w = weights.to(values).view(-1, *[1] * (values.ndim - 1))
    total, share = (agreeing * w).sum(0), (agreeing.sign_() * w).sum(0)
    return (total * sign).div_(share.masked_fill_(share == 0, 1))


def sign_consensus(values: Float[Tensor, "N ..."], *, draw: float = 0.0) -> Float[Tensor, " ..."]:
    """Elect a sign per entry, then average what agrees with it: the second half of TIES.

    Args:
        values: of all adapters.
        draw: an entry whose sum is at most this share of its magnitudes has no majority and becomes 0; for places
            where the sum is zero by construction, and its sign would be that of a rounding error.
    """
    merged = disjoint_mean(values, elect_sign(values))
    return torch.where(values.sum(0).abs() > draw * values.abs().sum(0), merged, 0) if draw else merged


def majority_mean(values: Float[Tensor, "N ..."]) -> Float[Tensor, " ..."]:
    """Return the mean of the entries whose sign more adapters share; zeros take no part.

    Equal numbers on both sides are settled by the sign of the sum.
    """
    count = values.sign().sum(0)
    sign = torch.where(count == 0, elect_sign(values), count.sign())
    return disjoint_mean(values, sign)
