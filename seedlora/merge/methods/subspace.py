"""SeedLoRA's later, two-stage rule: settle the large entries one by one, the rest in the common subspace."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from seedlora.merge.steps.consensus import majority_mean, sign_consensus
from seedlora.merge.steps.sparsify import drop, magnitude_thresholds, repeatable_stream, trim
from seedlora.updates.algebra import checked_choice, checked_range, factor_grams, in_span, thin_svd
from seedlora.updates.dense import BlockMerge, DenseUpdates, dense_update, row_blocks
from seedlora.updates.factors import LoRAFactors

#: Sums of Z below this share of their magnitudes are zero: float64 leaves errors of 1e-8 in them.
_DRAW = 1e-6
Z_MERGES = ("ties", "mean", "dare")


def seedlora_subspace(
    stack: LoRAFactors,
    *,
    quantile: float = 0.9,
    subspace_rank: int | None = None,
    z_merge: str = "ties",
    z_density: float = 1.0,
    p: float = 0.5,
    generator: torch.Generator | None = None,
) -> DenseUpdates:
    r"""Settle entries that are large in some adapter by majority, and merge all others within a common subspace.

    Stage 1, per entry j, with one threshold :math:`\sigma` for the layer: if some adapters have
    :math:`|\tau_n(j)| \ge \sigma`, the entry is the mean over those of them whose sign the larger number shares (all
    of them, where they agree). Stage 2, every other entry:

    .. math:: \bar\Delta \approx U \Sigma V^\top, \quad Z_n = U^\top \Delta_n V, \quad
        \Delta = U \, \mathrm{merge}(Z_1, ..., Z_N) \, V^\top

    Cost: two passes over row blocks of ``N*P*K`` entries; stage 2 stays within the factors.

    Readings taken where every source reached is silent: :math:`\sigma` is the quantile of the magnitudes of all
    adapters' entries in the layer together; the subspace has rank ``N*R``; the Z are merged by TIES without a trim.
    In that subspace the Z add up to a diagonal matrix, so off its diagonal TIES has no sign to elect unless the trim
    took something away: such entries become 0, their mean.
    A draw between as many positive as negative entries goes to the sign of their sum.

    Args:
        stack: the adapters of one layer.
        quantile: which quantile of all magnitudes :math:`\sigma` is, in [0, 1).
        subspace_rank: rank of the subspace. Default: ``N*R``.
        z_merge: ``ties``, ``mean`` or ``dare`` (random drop, then mean).
        z_density: share of each Z that ``ties`` keeps.
        p: drop probability of ``dare``.
        generator: for ``dare``. Default: the stream of seed 0.

    Returns:
        A dense update of full rank.

    Raises:
        ValueError: if an option is out of range.

    References:
        SeedLoRA, ICML 2025 version, as reported second-hand; its code was not found.

    Example:
        >>> import torch
        >>> from seedlora import LoRAFactors
        >>> stack = LoRAFactors(A=torch.tensor([[[4.0, 1, 0]], [[2.0, -3, 1]]]), B=torch.ones(2, 1, 1))
        >>> seedlora_subspace(stack, quantile=0.5).dense()
        tensor([[[ 3.0000, -3.0000,  0.5000]]])
    """
    checked_range("quantile", quantile, 0, 1 - 1e-9)
    checked_range("p", p, 0, 1 - 1e-9)
    checked_range("z_density", z_density, 0, 1, open_low=True)
    checked_choice("z_merge", z_merge, Z_MERGES)
    subspace_rank = len(stack) * stack.rank if subspace_rank is None else subspace_rank
    if subspace_rank < 1:
        raise ValueError(f"subspace_rank must be at least 1, got {subspace_rank}")
    rest = _subspace_merge(stack, subspace_rank, z_merge, z_density, p, repeatable_stream(generator))
    limit = magnitude_thresholds(
        lambda step: (block.flatten()[None] for block in row_blocks(stack, step)), 1 - quantile
    )

    def combine() -> BlockMerge:
        start = 0

        def merge(block_NPK: Float[Tensor, "N P K"]) -> Float[Tensor, "P K"]:
            nonlocal start
            rows = slice(start, start + block_NPK.shape[1])
            start = rows.stop
            large = trim(block_NPK, limit.expand(len(block_NPK)))
            compute = block_NPK.dtype
            other = rest.B[0, rows].to(compute) @ rest.A[0].to(compute)
            return torch.where((large != 0).any(0), majority_mean(large), other)

        return merge

    return dense_update(stack, combine)


def _subspace_merge(
    stack: LoRAFactors,
    rank: int,
    z_merge: str,
    z_density: float,
    p: float,
    generators: Callable[[], torch.Generator],
) -> LoRAFactors:
    """Merge all entries in the common subspace, as stage 2 does: one adapter of the subspace's rank."""
    n, r = len(stack), stack.rank
    compute = torch.promote_types(stack.B.dtype, torch.float32)
    stack = stack.to(compute)
    gram_b, gram_a = factor_grams(stack)
    svd = thin_svd(gram_b, gram_a)  # of the sum; the mean has the same vectors
    left, right = svd.left[:, :rank], svd.right[:rank]
    rows, columns = left.T @ gram_b, gram_a @ right.T
    z = torch.stack([rows[:, i : i + r] @ columns[i : i + r] for i in range(0, n * r, r)])
    if z_merge == "ties":
        merged = sign_consensus(trim(z, magnitude_thresholds(lambda step: [z[..., ::step]], z_density)), draw=_DRAW)
    else:
        merged = (drop(z, p, generators()) if z_merge == "dare" else z).mean(0)
    return in_span(stack, left @ merged, right)
