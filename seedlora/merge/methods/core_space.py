"""Core space merging (Panariello et al., 2025): non-linear rules on lossless small matrices."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from seedlora.merge.methods.ties import SCOPES
from seedlora.merge.steps.consensus import sign_consensus
from seedlora.merge.steps.sparsify import magnitude_thresholds, trim
from seedlora.merge.steps.walk import Walk
from seedlora.updates.algebra import checked_choice, checked_range, factor_grams, in_span, left_singular, side_by_side
from seedlora.updates.factors import LoRAFactors

BASES = ("factors", "updates")


def core_ties(
    stack: LoRAFactors,
    *,
    density: float = 1.0,
    scale: float = 1.0,
    basis: str = "factors",
    thresholds: Float[Tensor, " N"] | None = None,
) -> LoRAFactors:
    r"""Apply TIES to the matrices that hold the updates without loss in a basis common to all adapters.

    .. math:: M_n = U^\top \Delta_n V, \qquad \Delta = \lambda \, U \, \mathrm{TIES}(M_1, ..., M_N) \, V^\top

    Cost: ``(D + K) * (N*R)**2`` multiplications; no ``(D, K)`` matrix is formed.

    Readings taken: U and V are the left singular vectors of ``[B_1 | ... | B_N]`` and the right ones of
    ``[A_1; ...; A_N]``, scaling in B, as in the paper (``basis="factors"``). TIES depends on the basis, so the result
    then depends on how an update is split into B and A; ``basis="updates"`` takes the singular vectors of the updates
    side by side and on top of each other, which does not.

    Args:
        stack: the adapters of one layer.
        density: share of each M's entries that TIES keeps, in (0, 1].
        scale: :math:`\lambda`.
        basis: ``factors`` or ``updates``.
        thresholds: smallest magnitude that each adapter keeps, shape ``(N,)``. Default: by ``density`` of this layer.

    Returns:
        One adapter of rank at most ``N*R``, in the dtypes of ``stack``.

    Raises:
        ValueError: if an option is out of range.

    References:
        Panariello et al., "Accurate and Efficient Low-Rank Model Merging in Core Space", arXiv 2509.17786.

    Example:
        >>> import torch
        >>> from seedlora import LoRAFactors
        >>> stack = LoRAFactors(A=torch.eye(2)[:, None], B=torch.tensor([[[3.0], [0]], [[0], [1.0]]]))
        >>> core_ties(stack).dense()  # no entry is shared, so no sign is outvoted
        tensor([[[3., 0.],
                 [0., 1.]]])
    """
    checked_range("density", density, 0, 1, open_low=True)
    left, right, cores = _cores(stack, basis)
    limits = magnitude_thresholds(lambda step: [cores[..., ::step]], density) if thresholds is None else thresholds
    merged = sign_consensus(trim(cores, limits)) * scale
    return in_span(stack, left @ merged, right)


def core_thresholds(
    walk: Walk, *, density: float = 1.0, basis: str = "factors", scope: str = "layer"
) -> Float[Tensor, " N"] | None:
    """Return the thresholds of :func:`core_ties` over all layers together, or none: each layer then takes its own."""
    checked_range("density", density, 0, 1, open_low=True)
    checked_choice("basis", basis, BASES)
    if checked_choice("scope", scope, SCOPES) == "layer":
        return None
    return magnitude_thresholds(
        lambda step: (_cores(stack, basis).matrices[..., ::step] for _, stack in walk()), density
    )


class _Cores(NamedTuple):
    """Core matrices of updates, and the coordinates of their basis: ``U = B_cat left``, ``V^T = right A_cat``."""

    left: Float[Tensor, "M Q"]
    right: Float[Tensor, "P M"]
    matrices: Float[Tensor, "N Q P"]


def _cores(stack: LoRAFactors, basis: str) -> _Cores:
    """Compute the core matrices of the updates and the basis that they are in, in float64."""
    n, r = len(stack), stack.rank
    gram_b, gram_a = factor_grams(stack)
    if checked_choice("basis", basis, BASES) == "factors":
        left, right = left_singular(gram_b)[0], left_singular(gram_a)[0].T
    else:
        left, right = _update_basis(gram_b, gram_a, r), _update_basis(gram_a, gram_b, r).T
    rows, columns = (left.T @ gram_b).view(-1, n, r), (gram_a @ right.T).view(n, r, -1)
    return _Cores(left, right, torch.einsum("qnr,nrp->nqp", rows, columns))


def _update_basis(gram_side: Tensor, gram_other: Tensor, r: int) -> Tensor:
    """Return the coordinates of the updates' singular vectors, the updates placed so that this side's factors span
    them.
    """
    spread = side_by_side(gram_other, r)
    return spread @ left_singular(spread.T @ gram_side @ spread)[0]
