"""Compute causal attention on a CPU by plain products of small blocks, each of which stays in the processor's caches.

A block is at most :data:`BLOCK` queries of one document, of all heads that share keys, with the keys up to the last of
them: so nothing behind the diagonal is computed but within a block, keys are not repeated for the heads that share
them, and neither scores nor weights are kept for the backward pass, which computes them again. Torch's fused kernel
takes 1.6 times as long for forward and backward of 3 x 512 tokens in bfloat16, plain products of whole rows 1.8 times
(``benchmarks/cpu_kernels.py``). Scores and sums have the precision of ``eager`` attention.

Shape legend: ``T`` tokens, ``H`` heads of the queries, ``G`` of keys and values, ``K`` features of a head; of a block
``c`` queries and ``j`` keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

#: Queries of a block.
BLOCK = 128


class _Block(NamedTuple):
    """Say which queries and which keys of the row meet, and which of their scores the mask of the block hides."""

    queries: slice
    keys: slice
    mask: Tensor


def block_attention(
    query: Float[Tensor, "H T K"],
    key: Float[Tensor, "G T K"],
    value: Float[Tensor, "G T K"],
    lengths: Sequence[int],
    *,
    scaling: float,
    window: int | None = None,
) -> Float[Tensor, "H T K"]:
    """Compute causal attention within each document of a row.

    Args:
        query: of the row.
        key: of the row; H is a multiple of G.
        value: of the row.
        lengths: tokens of each document, in their order.
        scaling: of the scores.
        window: the most tokens that one sees, itself among them; default all before it.
    """
    out: Tensor = _BlockAttention.apply(query, key, value, tuple(lengths), scaling, window)
    return out


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scaling: float, window: int | None
    ) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        q_GRTK, out_GRTK = _grouped(q, k), _grouped(out, k)
        for block in _blocks(lengths, window, q.dtype):
            weights = _weights(q_GRTK, k, block, scaling).to(q.dtype)
            _put(out_GRTK, block.queries, torch.bmm(weights, v[:, block.keys]))
        ctx.save_for_backward(q, k, v, out)
        ctx.lengths, ctx.scaling, ctx.window = lengths, scaling, window
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out = ctx.saved_tensors
        high = torch.promote_types(q.dtype, torch.float32)
        q_GRTK, grad_GRTK = _grouped(q, k), _grouped(grad, k)
        # What the softmax takes off each weight's gradient: the sum of weights times gradients is that of the outputs.
        mean_GRT1 = _grouped((grad.to(high) * out.to(high)).sum(-1, keepdim=True), k)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=high), torch.zeros_like(v, dtype=high)
        dq_GRTK = _grouped(dq, k)
        for block in _blocks(ctx.lengths, ctx.window, q.dtype):
            weights = _weights(q_GRTK, k, block, ctx.scaling)
            above = _take(grad_GRTK, block.queries)
            dv[:, block.keys] += torch.bmm(weights.to(q.dtype).transpose(1, 2), above)
            d_weights = torch.bmm(above, v[:, block.keys].transpose(1, 2))
            d_scores = (d_weights - _take(mean_GRT1, block.queries)).mul_(weights).mul_(ctx.scaling).to(q.dtype)
            _put(dq_GRTK, block.queries, torch.bmm(d_scores, k[:, block.keys]))
            dk[:, block.keys] += torch.bmm(d_scores.transpose(1, 2), _take(q_GRTK, block.queries))
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _blocks(lengths: Sequence[int], window: int | None, dtype: torch.dtype) -> Iterator[_Block]:
    """Give the blocks of all documents."""
    begin = 0
    for length in lengths:
        for first in range(0, length, BLOCK):
            end = min(first + BLOCK, length)
            if window is None:
                oldest, mask = 0, _mask(end - first, 0, None, dtype)
            else:
                oldest = max(0, first - window + 1)
                mask = _mask(end - first, first - oldest, window, dtype)
            yield _Block(slice(begin + first, begin + end), slice(begin + oldest, begin + end), mask)
        begin += length


@lru_cache(maxsize=1024)
def _mask(queries: int, before: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """Return 0 where a query sees a key, minus infinity elsewhere, for the last keys of a block: those of its queries,
    and as many before them as are asked for.
    """
    with torch.inference_mode(False):
        seen = torch.ones(queries, before + queries, dtype=torch.bool).tril(before)
        if window is not None:
            seen = seen.triu(before - window + 1)
        return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))


def _weights(q_GRTK: Tensor, k: Tensor, block: _Block, scaling: float) -> Tensor:
    """Return the attention weights of a block, (G, R c, j), in float32 or better."""
    scores = torch.bmm(_take(q_GRTK, block.queries), k[:, block.keys].transpose(1, 2)).mul_(scaling)
    queries, keys = block.mask.shape
    scores.unflatten(1, (-1, queries))[..., -keys:].add_(block.mask)
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))


def _grouped(x_HTK: Tensor, k: Tensor) -> Tensor:
    """Return heads that share keys as a dimension of their own, (G, R, T, K), without a copy."""
    return x_HTK.unflatten(0, (k.shape[0], -1))


def _take(x_GRTK: Tensor, tokens: slice) -> Tensor:
    """Return some tokens of heads that share keys, one head after the other: (G, R c, K)."""
    return x_GRTK[:, :, tokens].flatten(1, 2)


def _put(x_GRTK: Tensor, tokens: slice, values: Tensor) -> None:
    """Put back what :func:`_take` took."""
    x_GRTK[:, :, tokens] = values.unflatten(1, (x_GRTK.shape[1], -1))
