"""Attention and the adapters' products on a CPU, each in several ways, forward and backward.

    python benchmarks/cpu_kernels.py

In the shapes of SmolLM2 (9 heads, 3 of keys, 64 features; widths 576 and 1,536), bfloat16, one thread, in processor
seconds: what a busy machine does beside it is not counted. The least of several calls, and ratios of one run.

- attention: torch's fused kernel on each document, plain products of whole documents, blocks of 128 queries
  (:mod:`seedlora.model.block_attention`), and the fused kernel on documents padded to the longest
- adapters: of three seeds, r = 8, one product with the columns of the others zeroed, and a product for each block
  (:mod:`seedlora.adapters.blockwise_update`), for blocks of so many tokens
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from seedlora.adapters.blockwise_update import BlockwiseUpdate
from seedlora.model.attention import Documents, padded
from seedlora.model.block_attention import block_attention

HEADS, KEY_HEADS, FEATURES = 9, 3, 64
SEEDS, RANK = 3, 8
LENGTHS = {
    "3 x 512": [512] * 3,
    "24 like GSM8K": np.clip(np.random.default_rng(0).lognormal(np.log(210), 0.4, 24), 100, 512).astype(int).tolist(),
    "24 x 29": [29] * 24,
}


def milliseconds(call: Callable[[], object], calls: int = 5) -> float:
    """The least processor time of a call, after one."""
    taken = []
    for _ in range(calls + 1):
        began = time.process_time()
        call()
        taken.append(time.process_time() - began)
    return 1e3 * min(taken[1:])


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Torch's kernel."""
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain products, as transformers has them."""
    k, v = (x.repeat_interleave(HEADS // KEY_HEADS, 1) for x in (k, v))
    hidden = torch.full((q.shape[2], q.shape[2]), float("-inf"), dtype=q.dtype).triu(1)
    scores = q @ k.mT * FEATURES**-0.5 + hidden
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def attention(lengths: list[int]) -> dict[str, float]:
    """The milliseconds of each way."""
    tokens, documents = sum(lengths), Documents(tuple(lengths), torch.device("cpu"))
    given = [
        torch.randn(1, tokens, h, FEATURES, dtype=torch.bfloat16).requires_grad_().transpose(1, 2)
        for h in (HEADS, KEY_HEADS, KEY_HEADS)
    ]
    above = torch.randn(1, tokens, HEADS, FEATURES, dtype=torch.bfloat16)
    scaling = FEATURES**-0.5

    def one_by_one(kernel: Callable[..., Tensor]) -> Tensor:
        parts = zip(*(each.split(lengths, dim=2) for each in given), strict=True)
        return torch.cat([kernel(*part) for part in parts], dim=2).transpose(1, 2)

    def blocks() -> Tensor:
        q, k, v = (each[0] for each in given)
        return block_attention(q, k, v, lengths, scaling=scaling).transpose(0, 1)[None]

    ways: dict[str, Callable[[], Tensor]] = {
        "blocks": blocks,
        "plain products": lambda: one_by_one(plain),
        "fused kernel": lambda: one_by_one(fused),
        "fused kernel, padded": lambda: padded(given[0], given[1], given[2], documents, scaling, None),
    }
    return {name: milliseconds(lambda way=way: way().backward(above)) for name, way in ways.items()}


def adapters(inputs: int, outputs: int, block: int) -> dict[str, float]:
    """The milliseconds of each way."""
    rows, ranks, scales = SEEDS * block, (RANK,) * SEEDS, (2.0,) * SEEDS
    x, a, b = (
        torch.randn(shape, dtype=torch.bfloat16).requires_grad_()
        for shape in ((rows, inputs), (SEEDS * RANK, inputs), (outputs, SEEDS * RANK))
    )
    y, above = (torch.randn(rows, outputs, dtype=torch.bfloat16) for _ in range(2))
    mask = torch.block_diag(*[torch.full((1, RANK), 2.0, dtype=torch.bfloat16)] * SEEDS).unsqueeze(1)

    def masked() -> None:
        h = torch.mm(x, a.t()).view(SEEDS, block, -1) * mask
        y.clone().addmm_(h.view(rows, -1), b.t()).backward(above)

    def blockwise() -> None:
        BlockwiseUpdate.apply(y.clone(), x, a, b, ranks, scales, (block,) * SEEDS).backward(above)

    return {"a product for each": milliseconds(blockwise, 12), "one product": milliseconds(masked, 12)}


def show(what: str, found: dict[str, float]) -> None:
    """Print a line: milliseconds, and how many times the first."""
    first = next(iter(found.values()))
    print(f"{what}: " + ", ".join(f"{name} {ms:.1f} ms ({ms / first:.2f})" for name, ms in found.items()), flush=True)


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name, lengths in LENGTHS.items():
        show(f"attention, {name} tokens", attention(lengths))
    for inputs, outputs in ((576, 576), (576, 1536), (1536, 576)):
        for block in (29, 116, 232, 512, 1536):
            show(f"adapters, {inputs} to {outputs}, {block} tokens", adapters(inputs, outputs, block))


if __name__ == "__main__":
    main()
