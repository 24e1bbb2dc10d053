"""Represent updates of full rank by functions that compute their row blocks.

Shape legend: ``N`` adapters, ``D`` output features, ``K`` input features, ``P`` rows of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from seedlora.updates.factors import LoRAFactors

#: Entries of all adapters in one block: 4 MiB in float32. The bits of a seeded rule depend on it.
BLOCK_ENTRIES = 2**20
#: Turns one block of rows of all adapters into the rows of the merged update.
BlockMerge: TypeAlias = Callable[[Float[Tensor, "N P K"]], Float[Tensor, "P K"]]


@dataclass(frozen=True, eq=False)
class DenseUpdates:
    """The updates of ``N`` adapters to one layer that have no factors; the twin of :class:`LoRAFactors`.

    They are computed block by block, each time they are read: no ``(D, K)`` matrix need ever be held.

    Args:
        shape: ``(D, K)``.
        rank: what one of them is compressed to unless the caller says otherwise: ``N*R`` of the stack a merged update
            came from, ``R`` of a DoRA adapter.
        dtype: of the adapters they came from, and of the factors they are compressed to.
        device: where the blocks are.
        blocks: the rows in order, in blocks of shape ``(N, P, K)``, in float32 or float64; the same bits at every call.
        count: ``N``.
    """

    shape: tuple[int, int]
    rank: int
    dtype: torch.dtype
    device: torch.device
    blocks: Callable[[], Iterator[Float[Tensor, "N P K"]]]
    count: int = 1

    def __len__(self) -> int:
        """Return the number of adapters, ``N``."""
        return self.count

    def one(self, n: int) -> DenseUpdates:
        """Return the update of one adapter."""

        def blocks() -> Iterator[Float[Tensor, "1 P K"]]:
            return (block[n : n + 1] for block in self.blocks())

        return DenseUpdates(self.shape, self.rank, self.dtype, self.device, blocks)

    def to(self, dtype: torch.dtype) -> DenseUpdates:
        """Return the same updates, whose factors will have another dtype; the blocks stay as they are."""
        return replace(self, dtype=dtype)

    def dense(self) -> Float[Tensor, "N D K"]:
        """Materialise them. Costs ``N*D*K`` entries: for tests and small layers."""
        return torch.cat(list(self.blocks()), 1)


#: The updates of ``N`` adapters to one layer, in either form.
Updates: TypeAlias = LoRAFactors | DenseUpdates
#: A rule that is linear gives back the form that it was given.
AnyUpdates = TypeVar("AnyUpdates", LoRAFactors, DenseUpdates)


def block_rows(n: int, k: int) -> int:
    """Return how many rows one block of ``n`` adapters with ``k`` columns has."""
    return max(1, BLOCK_ENTRIES // (n * k))


def row_blocks(stack: Updates, step: int = 1) -> Iterator[Float[Tensor, "N P K"]]:
    """Give the entries of the updates, all adapters together, a block of rows at a time; in float32 or higher.

    The partition depends on ``N`` and ``K`` alone, so that every pass over a layer sees the same bits.

    Args:
        stack: the adapters.
        step: give every ``step``-th column only.
    """
    if isinstance(stack, DenseUpdates):
        for block in stack.blocks():
            yield block[..., ::step]
        return
    compute = torch.promote_types(torch.promote_types(stack.A.dtype, stack.B.dtype), torch.float32)
    a, d = stack.A[:, :, ::step].to(compute).contiguous(), stack.shape[0]
    rows = block_rows(len(stack), a.shape[2])
    for start in range(0, d, rows):
        yield stack.B[:, start : start + rows].to(compute) @ a


def dense_update(stack: Updates, combine: Callable[[], BlockMerge], *, rank: int | None = None) -> DenseUpdates:
    """Return the one update whose rows are ``combine()(rows of all adapters)``.

    Args:
        stack: the adapters.
        combine: called once per pass, so that a random rule can start its stream again.
        rank: what it is compressed to by default. Default: ``N*R``.
    """

    def blocks() -> Iterator[Float[Tensor, "1 P K"]]:
        merge = combine()
        for block_NPK in row_blocks(stack):
            yield merge(block_NPK)[None]

    rank = len(stack) * stack.rank if rank is None else rank
    return DenseUpdates(stack.shape, rank, stack.dtype, stack.device, blocks)
