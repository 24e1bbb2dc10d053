"""SeedLoRA: average, then match the distribution of the individual updates."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from seedlora.updates.algebra import (
    CANCELLED,
    checked_range,
    checked_weights,
    gram,
    means,
    shrinkage,
    spread_gain,
    weighted_sum,
)
from seedlora.updates.dense import AnyUpdates


def seedlora(
    stack: AnyUpdates, *, weights: Float[Tensor, " N"] | list[float] | None = None, mean_shift: bool = True
) -> AnyUpdates:
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
    the same with Bessel's correction). If the average has no spread (below 1e-7 of the updates'), there is nothing to
    rescale: g = 1.

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

    Example:
        >>> import torch
        >>> from seedlora import LoRAFactors
        >>> stack = LoRAFactors(A=torch.tensor([[[2.0, 0, -2, 0]], [[0, 2.0, 0, -2]]]), B=torch.ones(2, 1, 1))
        >>> stack.dense().mean(0), seedlora(stack).dense()[0]  # as spread out as each of the two
        (tensor([[ 1.,  1., -1., -1.]]), tensor([[ 1.4142,  1.4142, -1.4142, -1.4142]]))
    """
    w = checked_weights(stack, weights) / len(stack)
    gain, mu = spread_gain(stack, w), means(stack)
    return weighted_sum(stack, w * gain, constant=mu.mean() - gain * (w @ mu) if mean_shift else None)


def seedlora_gain(stack: AnyUpdates, *, p: float = 0.5, cap: float = 2.0) -> AnyUpdates:
    r"""Average the updates, and scale the average by a chosen power of what averaging took from its length.

    .. math:: \Delta = \min(\rho^{-2p}, \mathrm{cap}) \, \bar\Delta, \qquad
        \rho = \|\bar\Delta\| / \tfrac1N \sum_n \|\Delta_n\|

    ``p = 0`` is soup; ``p = 1/2`` restores the norm, which is SeedLoRA without its mean shift and without the
    difference between norm and spread; ``p = 1`` restores the projection of the average on the common direction. The
    caller chooses ``p`` by the validation loss, for example from {0, .25, .5, .75, 1, 1.25}.

    Cost: ``(D + K) * (N*R)**2`` multiplications, one copy of the factors.

    Args:
        stack: the adapters of one layer.
        p: the power, 0 or more.
        cap: largest gain allowed, 1 or more; nearly cancelled averages would be blown up without it.

    Returns:
        One adapter of rank ``N*R``, in the dtypes of ``stack``.

    Raises:
        ValueError: if ``p`` or ``cap`` is out of range.

    References:
        Derived in this project from equation 5 of SeedLoRA.

    Example:
        >>> import torch
        >>> from seedlora import LoRAFactors
        >>> stack = LoRAFactors(A=torch.tensor([[[2.0, 0, -2, 0]], [[0, 2.0, 0, -2]]]), B=torch.ones(2, 1, 1))
        >>> seedlora_gain(stack, p=0.5).dense()  # as long as each of the two
        tensor([[[ 1.4142,  1.4142, -1.4142, -1.4142]]])
        >>> seedlora_gain(stack, p=1.0).dense()
        tensor([[[ 2.,  2., -2., -2.]]])
    """
    checked_range("p", p, 0, 10)
    checked_range("cap", cap, 1, 1e6)
    rho = shrinkage(gram(stack))
    gain = (rho ** (-2 * p)).clamp_max(cap) if rho > CANCELLED else torch.ones_like(rho)
    return weighted_sum(stack, gain.expand(len(stack)) / len(stack))
