"""Compress updates to a rank.

Shape legend: ``N`` adapters, ``D`` output features, ``K`` input features, ``R`` rank, ``P`` rows of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from seedlora.updates.algebra import checked_choice, factor_grams, in_span, thin_svd
from seedlora.updates.dense import DenseUpdates, Updates
from seedlora.updates.factors import LoRAFactors

#: A compression holds the whole update up to this many entries (512 MiB in float32), and recomputes blocks above.
HELD_ENTRIES = 2**27
#: Up to this many entries an exact SVD is the default.
EXACT_ENTRIES = 2**18
SVD_KINDS = ("auto", "exact", "randomized")
#: Of a randomised SVD: columns beyond the rank asked for, and how often it goes through the update and back.
_EXTRA_COLUMNS, _POWER_ITERATIONS = 8, 2
#: Rows of a block that are compared at a time.
_ROWS_AT_A_TIME = 1024


@dataclass(frozen=True, eq=False)
class Compressed:
    """An update of lower rank, and how far it is from the one it stands for.

    Attributes:
        factors: one adapter.
        error: relative Frobenius error, ``|Delta - B A| / |Delta|``; 0 for a zero update.
        svd: how it was found, ``exact`` or ``randomized``.
    """

    factors: LoRAFactors
    error: float
    svd: str = "exact"


def compress(
    update: Updates,
    rank: int,
    *,
    match_norm: bool = False,
    svd: str = "auto",
    generator: torch.Generator | None = None,
) -> Compressed:
    r"""Return the best approximation of an update at a rank, with its relative Frobenius error.

    Factors are truncated optimally (Eckart-Young) in ``(D + K) * R**2`` multiplications. A dense update is truncated
    optimally by a full SVD (``exact``), or nearly so by a randomised one (``randomized``: 8 extra columns, 2 power
    iterations, 7 passes over the row blocks); ``auto`` takes the exact one up to ``EXACT_ENTRIES`` entries. The error
    is that of the result at hand, before it is rounded to the dtype of ``update``, not a bound, accurate to about 1e-7:
    the last pass measures it, because a difference of squared norms in float32 hides what is below 1e-3.

    Args:
        update: of one adapter.
        rank: of the result, at most; less only if the update has less.
        match_norm: scale the result to the norm that the update had; truncation shortens it.
        svd: ``auto``, ``exact`` or ``randomized``; for dense updates.
        generator: for the randomised SVD. Default: a new one, seeded with 0.

    Raises:
        ValueError: if ``update`` is not one, ``rank`` is not a positive integer, or ``svd`` is unknown.

    References:
        Eckart and Young, 1936; Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1.
    """
    checked_choice("svd", svd, SVD_KINDS)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a positive integer, got {rank!r}")
    if len(update) != 1:
        raise ValueError(f"one update can be compressed at a time, got {len(update)}")
    if isinstance(update, LoRAFactors):
        whole = thin_svd(*factor_grams(update))
        square, s = whole.s.square().sum(), whole.s[:rank]
        gain, error = _gain_and_error(square, s, match_norm=match_norm)
        root = (s * gain).sqrt()
        return Compressed(in_span(update, whole.left[:, :rank] * root, whole.right[:rank] * root[:, None]), error)
    if svd == "auto":
        few = update.shape[0] * update.shape[1] <= EXACT_ENTRIES or rank + _EXTRA_COLUMNS >= min(update.shape)
        svd = "exact" if few else "randomized"
    held = [update.dense()[0]] if update.shape[0] * update.shape[1] <= HELD_ENTRIES else None

    def passes() -> Iterator[Tensor]:
        return iter(held) if held is not None else (block[0] for block in update.blocks())

    square, u, s, vh = _dense_svd(passes, update.shape, rank, svd, generator)
    gain, _ = _gain_and_error(square, s, match_norm=match_norm)
    root = (s * gain).sqrt().to(u.dtype)
    a, b = vh * root[:, None], u * root
    error = float((_squared_distance(passes(), b, a) / square).sqrt()) if square > 0 else 0.0
    return Compressed(LoRAFactors(a[None].to(update.dtype), b[None].to(update.dtype)), error, svd)


def compress_each(stack: DenseUpdates, rank: int, *, seed: int = 0) -> tuple[LoRAFactors, float]:
    """Compress each update on its own, and return them with the largest relative Frobenius error among them.

    Args:
        stack: the adapters of one layer.
        rank: of each.
        seed: of the randomised SVD.

    Raises:
        ValueError: if ``rank`` is not a positive integer.
    """
    parts = [compress(stack.one(n), rank, generator=torch.Generator().manual_seed(seed)) for n in range(len(stack))]
    return LoRAFactors.stack([part.factors for part in parts]), max(part.error for part in parts)


def _gain_and_error(
    square: Float[Tensor, ""], s: Float[Tensor, " Q"], *, match_norm: bool
) -> tuple[Float[Tensor, ""], float]:
    """Return the factor for singular values ``s``, kept of an update with squared norm ``square``, and the error."""
    kept = s.double().square().sum()
    if not square > 0 or not kept > 0:
        return s.new_ones(()), 0.0
    if not match_norm:
        return s.new_ones(()), float(((square - kept).clamp_min(0) / square).sqrt())
    # |D - g D_r|^2 = |D|^2 - 2 g |D_r|^2 + g^2 |D_r|^2 with g = |D| / |D_r|
    ratio = (kept / square).sqrt().clamp_max(1)
    return (1 / ratio).to(s.dtype), float((2 - 2 * ratio).sqrt())


class _DenseSVD(NamedTuple):
    """The SVD of a dense update up to a rank: its vectors and values, and the squared norm of the whole update."""

    square: Float[Tensor, ""]
    u: Float[Tensor, "D Q"]
    s: Float[Tensor, " Q"]
    vh: Float[Tensor, "Q K"]


def _dense_svd(
    passes: Callable[[], Iterator[Tensor]],
    shape: tuple[int, int],
    rank: int,
    svd: str,
    generator: torch.Generator | None,
) -> _DenseSVD:
    """Return the SVD, up to ``rank``, of a dense update whose row blocks every pass gives."""
    d, k = shape
    if svd == "exact":
        blocks = list(passes())
        dense = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        u, s, vh = torch.linalg.svd(dense, full_matrices=False)
        return _DenseSVD(dense.square().sum(dtype=torch.float64), u[:, :rank], s[:rank], vh[:rank])
    generator = generator or torch.Generator().manual_seed(0)
    width = min(rank + _EXTRA_COLUMNS, d, k)
    first = next(iter(passes()))
    probe_KW = torch.randn(k, width, generator=generator).to(first)
    square = torch.stack([block.square().sum(dtype=torch.float64) for block in passes()]).sum()
    for _ in range(_POWER_ITERATIONS):
        range_DW = torch.linalg.qr(torch.cat([block @ probe_KW for block in passes()]))[0]
        probe_KW = torch.linalg.qr(_transposed_product(passes(), range_DW))[0]
    range_DW = torch.linalg.qr(torch.cat([block @ probe_KW for block in passes()]))[0]
    v, s, uh = torch.linalg.svd(_transposed_product(passes(), range_DW), full_matrices=False)
    return _DenseSVD(square, range_DW @ uh.T[:, :rank], s[:rank], v.T[:rank])


def _squared_distance(blocks: Iterator[Tensor], b_DR: Tensor, a_RK: Tensor) -> Float[Tensor, ""]:
    """Return ``|Delta - B A|^2``, its rows taken in float32 or higher and summed in float64."""
    total, start = torch.zeros((), dtype=torch.float64, device=b_DR.device), 0
    for block in blocks:
        for part in block.split(_ROWS_AT_A_TIME):
            rest = torch.addmm(part, b_DR[start : start + len(part)], a_RK, alpha=-1)
            total, start = total + rest.square_().sum(dtype=torch.float64), start + len(part)
    return total


def _transposed_product(blocks: Iterator[Tensor], x_DW: Tensor) -> Tensor:
    """Return ``Delta^T x`` of shape ``(K, W)``, summed over the row blocks."""
    total, start = None, 0
    for block in blocks:
        part = block.T @ x_DW[start : start + len(block)]
        total, start = part if total is None else total.add_(part), start + len(block)
    assert total is not None
    return total
