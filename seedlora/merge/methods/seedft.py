"""Merge seeds by a common right singular basis ("seedft")."""

from __future__ import annotations

import torch

from seedlora.updates.algebra import align, factor_grams, in_span, inverse_root
from seedlora.updates.factors import LoRAFactors


def seedft(stack: LoRAFactors) -> LoRAFactors:
    r"""Keep KnOTS' common left basis and singular values, and orthogonalise the sum of the right vectors.

    .. math:: [\Delta_1 | ... | \Delta_N] = U \, \mathrm{diag}(s) \, [V_1^\top ... V_N^\top], \qquad
        \Delta = \tfrac{1}{\sqrt N} \, U \, \mathrm{diag}(s) \, \mathrm{polar}(\textstyle\sum_n V_n)^\top

    The factor :math:`1/\sqrt N` keeps the norm that an individual update has.

    Cost: ``(D + K) * (N*R)**2`` multiplications; no ``(D, K)`` matrix is formed.

    Reading taken: where the sum lacks rank, its polar factor is the partial isometry.

    Args:
        stack: the adapters of one layer.

    Returns:
        One adapter of rank at most ``N*R``, in the dtypes of ``stack``.

    References:
        Described second-hand in this project's notes, built on KnOTS (arXiv 2410.19735); no paper was reached.

    Example:
        >>> import torch
        >>> from seedlora import LoRAFactors
        >>> stack = LoRAFactors(A=torch.eye(2)[:, None], B=torch.tensor([[[3.0], [0]], [[0], [1.0]]]))
        >>> seedft(stack).dense()  # the values 3 and 1, over the root of 2
        tensor([[[2.1213, 0.0000],
                 [0.0000, 0.7071]]])
    """
    basis = align(stack)
    # sum_n V_n^T = diag(1/s) sum_n rows[n] A_n, with rows[n] of shape (Q, R)
    right = basis.rows.transpose(0, 1).flatten(1) / torch.where(basis.s > 0, basis.s, 1)[:, None]
    gram_a = factor_grams(stack)[1]
    polar = inverse_root(right @ gram_a @ right.T) @ right
    return in_span(stack, basis.left * (basis.s / len(stack) ** 0.5), polar)
