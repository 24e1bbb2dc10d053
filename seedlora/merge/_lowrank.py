"""Facts about updates, computed from their factors: no ``(D, K)`` matrix is ever formed.

Shape legend: ``N`` adapters, ``D`` output features, ``K`` input features, ``R`` rank.
Scalars are accumulated in float64, because the variance is a difference of large, near numbers.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from seedlora.factors import LoRAFactors


def gram(stack: LoRAFactors) -> Float[Tensor, "N N"]:
    r"""Frobenius inner products of all pairs of updates, in float64.

    .. math:: G_{ij} = \langle \Delta_i, \Delta_j \rangle = \sum (B_i^\top B_j) \odot (A_i A_j^\top)

    The matrix gives every norm, every cosine and the norm of every weighted sum of the updates.
    Costs ``(D + K) * (N*R)**2`` multiplications and ``2 * (N*R)**2`` numbers.
    """
    n, r = len(stack), stack.rank
    a = stack.A.double().flatten(0, 1)
    b = stack.B.double().transpose(0, 1).flatten(1)
    return ((b.T @ b) * (a @ a.T)).view(n, r, n, r).sum((1, 3))


def means(stack: LoRAFactors) -> Float[Tensor, " N"]:
    r"""Mean entry of each update, in float64: :math:`\mu(\Delta_n) = (1^\top B_n)(A_n 1) / DK`."""
    d, k = stack.shape
    return torch.einsum("nr,nr->n", stack.B.double().sum(1), stack.A.double().sum(2)) / (d * k)


def variances(stack: LoRAFactors) -> Float[Tensor, " N"]:
    r"""Population variance of each update's entries, in float64: :math:`\|\Delta_n\|^2 / DK - \mu(\Delta_n)^2`."""
    d, k = stack.shape
    squares = torch.stack([gram(LoRAFactors(a[None], b[None]))[0, 0] for a, b in zip(stack.A, stack.B, strict=True)])
    return (squares / (d * k) - means(stack) ** 2).clamp_min(0)


def weighted_sum(stack: LoRAFactors, weights: Float[Tensor, " N"]) -> LoRAFactors:
    r"""The sum :math:`\sum_n w_n B_n A_n`, exactly, as one adapter of rank ``N*R``: concatenated factors.

    Returns:
        One adapter (``N = 1``), in the dtypes of ``stack``; the weights go into ``B``.
    """
    compute = torch.promote_types(stack.B.dtype, torch.float32)
    b = stack.B.to(compute) * weights.to(stack.B.device, compute)[:, None, None]
    return LoRAFactors(
        stack.A.flatten(0, 1)[None].clone(),
        b.transpose(0, 1).flatten(1)[None].to(stack.B.dtype),
    )


def checked_weights(stack: LoRAFactors, weights: Float[Tensor, " N"] | list[float] | None) -> Float[Tensor, " N"]:
    """The caller's weights as a float64 tensor, or ones.

    Raises:
        ValueError: if there is not exactly one finite weight per adapter.
    """
    if weights is None:
        return torch.ones(len(stack), dtype=torch.float64, device=stack.A.device)
    tensor = torch.as_tensor(weights, dtype=torch.float64, device=stack.A.device)
    if tensor.shape != (len(stack),) or not bool(tensor.isfinite().all()):
        raise ValueError(f"weights must be {len(stack)} finite numbers, one per adapter, got {tensor.tolist()}")
    return tensor
