"""TIES (Yadav et al., NeurIPS 2023): trim, elect sign, disjoint mean."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from seedlora.merge.steps.consensus import sign_consensus
from seedlora.merge.steps.sparsify import magnitude_thresholds, trim
from seedlora.merge.steps.walk import AnyWalk
from seedlora.updates.algebra import checked_choice, checked_range
from seedlora.updates.dense import DenseUpdates, Updates, dense_update, row_blocks

#: Whether a threshold is taken over one layer, or over all layers together.
SCOPES = ("layer", "model")


def ties(
    stack: Updates,
    *,
    density: float = 0.2,
    scale: float = 1.0,
    thresholds: Float[Tensor, " N"] | None = None,
) -> DenseUpdates:
    r"""Keep each adapter's largest entries, elect a sign per entry, average the entries that have it.

    .. math:: \hat\tau_n = \mathrm{trim}_{density}(\Delta_n), \quad
        \gamma = \mathrm{sgn} \textstyle\sum_n \hat\tau_n, \quad
        \Delta = \lambda \, \mathrm{mean} \{\hat\tau_n : \mathrm{sgn}\, \hat\tau_n = \gamma\}

    Cost: two passes over row blocks of ``N*P*K`` entries, exact; the result is dense.

    Readings taken: entries equal to the threshold are all kept; a sum of exactly zero elects +1.

    Args:
        stack: the adapters of one layer.
        density: share of entries to keep, in (0, 1].
        scale: :math:`\lambda`.
        thresholds: smallest magnitude that each adapter keeps, shape ``(N,)``. Default: by ``density`` of this layer.

    Returns:
        A dense update of full rank.

    Raises:
        ValueError: if ``density`` is out of range.

    References:
        Yadav et al., "TIES-Merging", arXiv 2306.01708.

    Example:
        >>> import torch
        >>> from seedlora import LoRAFactors
        >>> stack = LoRAFactors(A=torch.tensor([[[4.0, 1, 0]], [[2.0, -3, 1]]]), B=torch.ones(2, 1, 1))
        >>> ties(stack, density=1.0).dense()  # the second entry is the mean of -3 alone
        tensor([[[ 3., -3.,  1.]]])
    """
    checked_range("density", density, 0, 1, open_low=True)
    limits = magnitude_thresholds(lambda step: row_blocks(stack, step), density) if thresholds is None else thresholds

    def merge(block_NPK: Float[Tensor, "N P K"]) -> Float[Tensor, "P K"]:
        return sign_consensus(trim(block_NPK, limits)) * scale

    return dense_update(stack, lambda: merge)


def ties_thresholds(walk: AnyWalk, *, density: float = 0.2, scope: str = "layer") -> Float[Tensor, " N"] | None:
    """Return the thresholds of :func:`ties` over all layers together, or none: each layer then takes its own.

    Args:
        walk: all layers.
        density: share of entries to keep.
        scope: ``layer`` or ``model``.

    Raises:
        ValueError: if an option is out of range.
    """
    checked_range("density", density, 0, 1, open_low=True)
    if checked_choice("scope", scope, SCOPES) == "layer":
        return None
    return magnitude_thresholds(
        lambda step: (block for _, stack in walk() for block in row_blocks(stack, step)), density
    )
