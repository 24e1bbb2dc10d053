"""SeedLoRA: average, then match the distribution of the individual updates."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from seedlora.factors import LoRAFactors
from seedlora.merge._lowrank import checked_weights, means, variances, weighted_sum


def seedlora(
    stack: LoRAFactors, *, weights: Float[Tensor, " N"] | list[float] | None = None, mean_shift: bool = True
) -> LoRAFactors:
    r"""Average the updates, then restore the mean and the spread that a single update has.

    .. math::
        \bar\Delta = \frac{1}{N} \sum_n w_n \Delta_n, \qquad
        \Delta = \hat\sigma \frac{\bar\Delta - \mu(\bar\Delta)}{\sigma(\bar\Delta)} + \hat\mu, \qquad
        \hat\mu = \frac{1}{N} \sum_n \mu(\Delta_n), \quad \hat\sigma = \frac{1}{N} \sum_n \sigma(\Delta_n)

    over all ``D*K`` entries of one layer's update. With the gain :math:`g = \hat\sigma / \sigma(\bar\Delta)` this
    is a sum of the factors scaled by ``g`` and one constant matrix, so it is exact as a LoRA of rank
    ``N*R + 1``: the last column of ``B`` holds :math:`\hat\mu - g \mu(\bar\Delta)`, the last row of ``A`` ones.

    Cost: ``(D + K) * (N*R)**2`` multiplications, one copy of the factors; no ``(D, K)`` matrix is formed.

    Readings taken where the paper is silent: statistics are per layer (not per model), over the scaled update
    ``s*B@A`` (not over ``A`` and ``B`` apart), and the spread is the population standard deviation (its ratio is
    the same with Bessel's correction). If the average has no spread at all, there is nothing to rescale: g = 1.

    Args:
        stack: ``A`` of shape ``(N, R, K)`` and ``B`` of shape ``(N, D, R)``, scaling folded into ``B``.
        weights: importance weights of shape ``(N,)``, used as given. Default: 1 each, as in the paper.
        mean_shift: keep the column that restores the mean. Without it the rank is ``N*R`` and each entry is off
            by :math:`\hat\mu - g \mu(\bar\Delta)`.

    Returns:
        One adapter of rank ``N*R + 1`` (``N*R`` without ``mean_shift``), in the dtypes of ``stack``.

    Raises:
        ValueError: if ``weights`` is not of shape ``(N,)``.

    References:
        "SeedLoRA: A Fusion Approach to Efficient LLM Fine-Tuning", equations 4 and 5; the reference statistics
        are the averages over all adapters.
    """
    w = checked_weights(stack, weights) / len(stack)
    average = weighted_sum(stack, w)
    mu_average, sigma_average = means(average)[0], variances(average)[0].sqrt()
    mu, sigma = means(stack).mean(), variances(stack).sqrt().mean()
    gain = sigma / sigma_average if sigma_average > 0 else torch.ones_like(sigma)
    scaled = weighted_sum(stack, w * gain)
    if not mean_shift:
        return scaled
    d, k = stack.shape
    column = (mu - gain * mu_average).to(scaled.B.dtype).expand(1, d, 1)
    return LoRAFactors(
        torch.cat([scaled.A, scaled.A.new_ones(1, 1, k)], dim=1),
        torch.cat([scaled.B, column], dim=2),
    )
