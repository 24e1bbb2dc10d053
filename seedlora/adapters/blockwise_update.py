"""Add the updates of adapters to their own blocks of rows, one product after the other.

Shape legend: ``M`` rows in all, ``m`` of one block; ``K`` input and ``D`` output features; ``R`` the ranks of all
adapters together, ``r`` of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

#: Rows (tokens) from which a block is long: the columns of the other adapters then cost more than calls of its own.
LONG_BLOCK = 512


class _Part(NamedTuple):
    """Say which rows belong to a block, which columns to its adapter, and how that is scaled."""

    rows: slice
    columns: slice
    scale: float


class BlockwiseUpdate(torch.autograd.Function):
    r"""Add ``s_i x_i A_i^T B_i^T`` to the rows of block i, in place.

    Autograd's own graph of products on slices would copy the whole of y for each of them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Float[Tensor, "M D"],
        x: Float[Tensor, "M K"],
        a: Float[Tensor, "R K"],
        b: Float[Tensor, "D R"],
        ranks: Sequence[int],
        scales: Sequence[float],
        sizes: Sequence[int],
    ) -> Float[Tensor, "M D"]:
        """Compute the sums.

        Args:
            ctx: keeps what the backward pass needs.
            y: outputs of the base layer, which are changed.
            x: inputs of the layer.
            a: of the adapters, one below the other.
            b: of the adapters, side by side.
            ranks: of the adapters; 0 where a block has none.
            scales: of the adapters.
            sizes: rows of the blocks.
        """
        hidden = x.new_zeros(len(x), max(ranks))
        for rows, columns, scale in _parts(ranks, scales, sizes):
            h = torch.mm(x[rows], a[columns].t(), out=hidden[rows, : columns.stop - columns.start]).mul_(scale)
            y[rows].addmm_(h, b[:, columns].t())
        ctx.save_for_backward(x, a, b, hidden)
        ctx.parts = ranks, scales, sizes
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Float[Tensor, "M D"]) -> tuple[Tensor | None, ...]:
        """Compute the gradients of x, A and B; that of y is the one given."""
        x, a, b, hidden = ctx.saved_tensors
        whole = torch.zeros_like if 0 in ctx.parts[0] else torch.empty_like
        dx = whole(x) if ctx.needs_input_grad[1] else None
        da, db = torch.empty_like(a), torch.empty_like(b)
        for rows, columns, scale in _parts(*ctx.parts):
            dh = torch.mm(dy[rows], b[:, columns]).mul_(scale)
            db[:, columns] = torch.mm(dy[rows].t(), hidden[rows, : columns.stop - columns.start])
            da[columns] = torch.mm(dh.t(), x[rows])
            if dx is not None:
                torch.mm(dh, a[columns], out=dx[rows])
        return dy, dx, da, db, None, None, None


def _parts(ranks: Sequence[int], scales: Sequence[float], sizes: Sequence[int]) -> Iterator[_Part]:
    """Give the blocks that have an adapter."""
    row = column = 0
    for rank, scale, size in zip(ranks, scales, sizes, strict=True):
        if rank and size:
            yield _Part(slice(row, row + size), slice(column, column + rank), scale)
        row, column = row + size, column + rank
