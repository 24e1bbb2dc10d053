"""Products of each block with its own adapter give what one product with the columns of others zeroed gives."""

from __future__ import annotations

import torch

from seedlora.adapters.blockwise_update import BlockwiseUpdate
from tests.helpers.precision import SAME


def test_blocks_equal_the_dense_update_forward_and_backward():
    generator = torch.Generator().manual_seed(0)
    ranks, scales, sizes = (2, 0, 3), (0.5, 1.0, 2.0), (4, 5, 1)
    k, d, m, r = 7, 6, sum(sizes), sum(ranks)
    found = []
    for blockwise in (False, True):
        generator.manual_seed(0)
        x, y, a, b, weight = (
            torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
            for shape in ((m, k), (m, d), (r, k), (d, r), (m, d))
        )
        if blockwise:
            out = BlockwiseUpdate.apply(y.clone(), x, a, b, ranks, scales, sizes)
        else:
            deltas = [s * bb @ aa for s, aa, bb in zip(scales, a.split(ranks), b.split(ranks, dim=1), strict=True)]
            parts = zip(x.split(sizes), deltas, strict=True)
            out = y + torch.cat([part @ delta.T for part, delta in parts])
        (out * weight).sum().backward()
        found.append([out, x.grad, y.grad, a.grad, b.grad])
    for wanted, got in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=SAME, atol=SAME)
