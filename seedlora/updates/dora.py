"""Compute DoRA's updates as they act on the base weights.

Shape legend: ``N`` adapters, ``D`` output features, ``K`` input features, ``R`` rank, ``P`` rows of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from seedlora.updates.dense import DenseUpdates, block_rows
from seedlora.updates.factors import LoRAFactors


def dora_updates(
    stack: LoRAFactors,
    magnitudes: Float[Tensor, "N D"],
    weight: Callable[[int, int], Float[Tensor, "P K"]],
) -> DenseUpdates:
    r"""Return what DoRA adapters add to the weights of one layer, in row blocks.

    .. math:: \Delta_n = \mathrm{diag}(c_n) (W + B_n A_n) - W, \qquad c_n = m_n / \|W + B_n A_n\|_{row}

    which is :math:`\mathrm{diag}(c_n - 1) W + \mathrm{diag}(c_n) B_n A_n`: the first term has the rank of ``W``, so no
    adapter of low rank holds it exactly.

    Cost: ``N*D*K*R`` multiplications and one reading of ``W`` per pass; one block of rows is held at a time. A row
    whose norm is zero has no direction: :math:`c = 1` there.

    Args:
        stack: the adapters' factors, scaling folded into ``B``.
        magnitudes: :math:`m_n`, one per output feature.
        weight: rows ``start`` to ``stop`` of the base weight, in float32 or higher, on any device.

    Raises:
        ValueError: if the magnitudes are not of shape ``(N, D)``, or, when the blocks are read, if a sum overflows.

    References:
        Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353, equation 5.
    """
    (n, r), (d, k) = (len(stack), stack.rank), stack.shape
    if magnitudes.shape != (n, d):
        raise ValueError(f"magnitudes must be of shape (N, D) = {(n, d)}, got {tuple(magnitudes.shape)}")

    def blocks() -> Iterator[Float[Tensor, "N P K"]]:
        step = block_rows(n, k)
        for start in range(0, d, step):
            w_PK = weight(start, min(start + step, d))
            compute = torch.promote_types(torch.promote_types(w_PK.dtype, stack.dtype), torch.float32)
            w_PK = w_PK.to(stack.device, compute)
            low_NPK = stack.B[:, start : start + step].to(compute) @ stack.A.to(compute)
            norms = torch.linalg.vector_norm(w_PK + low_NPK, dim=-1, dtype=torch.float64)
            m_NP = magnitudes[:, start : start + step].double()
            c_NP1 = torch.where(norms > 0, m_NP / norms, 1.0)[..., None]
            if not bool(norms.isfinite().all() & c_NP1.to(compute).isfinite().all()):
                raise ValueError("a DoRA adapter's m (W + B A) / |W + B A| overflows: it holds values far too large")
            # (c - 1) W + c B A loses no digits where c is near 1, as it is after a short training
            yield (c_NP1 - 1).to(compute) * w_PK + low_NPK.mul_(c_NP1.to(compute))

    return DenseUpdates((d, k), r, stack.dtype, stack.device, blocks, count=n)
