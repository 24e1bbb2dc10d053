"""KnOTS (Stoica et al., ICLR 2025): non-linear rules in the basis of the updates side by side."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from seedlora.merge.methods.ties import SCOPES
from seedlora.merge.steps.consensus import sign_consensus
from seedlora.merge.steps.sparsify import drop, magnitude_thresholds, repeatable_stream, trim
from seedlora.merge.steps.walk import Walk
from seedlora.updates.algebra import align, checked_choice, checked_range, with_rows
from seedlora.updates.factors import LoRAFactors


def knots_ties(
    stack: LoRAFactors,
    *,
    density: float = 0.2,
    scale: float = 1.0,
    thresholds: Float[Tensor, " N"] | None = None,
) -> LoRAFactors:
    r"""Apply TIES to the updates as seen from their common left singular basis.

    .. math:: [\Delta_1 | ... | \Delta_N] = U \, \mathrm{diag}(s) \, [V_1 ... V_N], \quad
        C_n = \mathrm{diag}(s) V_n = U^\top \Delta_n, \quad
        \Delta = \lambda \, U \, \mathrm{TIES}(C_1, ..., C_N)

    Cost: ``(D + K) * (N*R)**2`` multiplications and three copies of ``(N, N*R, K)``; no ``(D, K)`` matrix is formed.

    Readings taken: the trim keeps one share of each adapter's entries over all layers together, as in the authors'
    code (``scope="model"`` of :func:`knots_thresholds`); called on a single layer, this function takes that layer's
    own. A sum of exactly zero elects +1, where the authors' code takes the sign that most sums of the whole model have.
    That matters only where kept entries cancel to the last bit, since what everyone trimmed is 0 either way; and the
    majority is no fact about the updates, because an SVD leaves the sign of each row of the :math:`C_n` open. It would
    cost one more pass over the layers. The scaling ``alpha / r`` is included; the authors' code leaves it out, because
    it is 1 there.

    Args:
        stack: the adapters of one layer.
        density: share of entries that the trim keeps, in (0, 1].
        scale: :math:`\lambda`. The authors ship .2/.6 (ViT-B/32), .2/.5 (ViT-L/14), 1/.5 (Llama3-8B on NLI) for
            density and scale, with unrelated tasks; adapters of one task need no shrinking.
        thresholds: smallest magnitude that each adapter keeps, shape ``(N,)``. Default: by ``density`` of this layer.

    Returns:
        One adapter of rank at most ``N*R``, in the dtypes of ``stack``.

    Raises:
        ValueError: if ``density`` is out of range.

    References:
        Stoica et al., "Model merging with SVD to tie the KnOTS", arXiv 2410.19735.

    Example:
        >>> import torch
        >>> from seedlora import LoRAFactors
        >>> stack = LoRAFactors(A=torch.tensor([[[4.0, 1, 0]], [[2.0, -3, 1]]]), B=torch.ones(2, 1, 1))
        >>> knots_ties(stack, density=1.0).dense()
        tensor([[[ 3., -3.,  1.]]])
    """
    checked_range("density", density, 0, 1, open_low=True)
    basis = align(stack)
    c_NQK = basis.aligned(stack)
    limits = magnitude_thresholds(lambda step: [c_NQK[..., ::step]], density) if thresholds is None else thresholds
    return with_rows(stack, basis.left, sign_consensus(trim(c_NQK, limits)) * scale)


def knots_thresholds(walk: Walk, *, density: float = 0.2, scope: str = "model") -> Float[Tensor, " N"] | None:
    """Return the thresholds of :func:`knots_ties` over all layers together; none with ``scope="layer"``.

    Cost: one more pass over the layers, of ``(D + K) * (N*R)**2`` multiplications per layer.
    """
    checked_range("density", density, 0, 1, open_low=True)
    if checked_choice("scope", scope, SCOPES) == "layer":
        return None
    return magnitude_thresholds(lambda step: (align(stack).aligned(stack, step) for _, stack in walk()), density)


def knots_dare_ties(
    stack: LoRAFactors, *, p: float = 0.5, scale: float = 1.0, generator: torch.Generator | None = None
) -> LoRAFactors:
    r"""Merge as :func:`knots_ties` does, with DARE's random drop on the :math:`C_n` in the place of the trim.

    The authors' code can trim what is left after the drop; here it is not, as in each of their configurations that
    drops: these keep all of it (``topK`` 100), with p and scale .1/.7 (ViT-B/32), .1/.5 (ViT-L/14), .8/.4 (Llama3-8B).

    Cost: ``(D + K) * (N*R)**2`` multiplications and four copies of ``(N, N*R, K)``.

    Args:
        stack: the adapters of one layer.
        p: drop probability, in [0, 1).
        scale: factor of the result.
        generator: of the masks. Default: the stream of seed 0.

    Returns:
        One adapter of rank at most ``N*R``, in the dtypes of ``stack``.

    Raises:
        ValueError: if ``p`` is out of range.

    References:
        Stoica et al., arXiv 2410.19735; Yu et al., arXiv 2311.03099.

    Example:
        >>> import torch
        >>> from seedlora import LoRAFactors
        >>> stack = LoRAFactors(A=torch.ones(2, 1, 1000), B=torch.ones(2, 1, 1))
        >>> knots_dare_ties(stack, p=0.75).dense().abs().unique()  # dropped of both, or kept of one at least
        tensor([0., 4.])
    """
    checked_range("p", p, 0, 1 - 1e-9)
    basis = align(stack)
    return with_rows(
        stack, basis.left, sign_consensus(drop(basis.aligned(stack), p, repeatable_stream(generator)())) * scale
    )
