"""DoRA's updates against their formula."""

from __future__ import annotations

import pytest
import torch

from seedlora.merge.registry import METHODS
from seedlora.updates import dense as _dense
from seedlora.updates.dense import row_blocks
from seedlora.updates.dora import dora_updates
from seedlora.updates.factors import LoRAFactors
from tests.helpers.merge_cases import dense, make_stack
from tests.helpers.precision import relative


def dora_case(n=3, r=2, d=13, k=11, seed=0):
    stack = make_stack(n=n, r=r, d=d, k=k, seed=seed)
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(d, k, generator=g, dtype=torch.float64)
    magnitudes = weight.norm(dim=1) * (1 + 0.1 * torch.randn(n, d, generator=g, dtype=torch.float64))
    return stack, magnitudes, weight


def dora_formula(stack, magnitudes, weight):
    """Equation 5 of the paper, row by row."""
    found = torch.empty(len(stack), *weight.shape, dtype=torch.float64)
    for n in range(len(stack)):
        for i in range(len(weight)):
            row = weight[i] + stack.B[n, i] @ stack.A[n]
            found[n, i] = magnitudes[n, i] * row / row.square().sum().sqrt() - weight[i]
    return found


def test_dora_is_its_formula(monkeypatch):
    stack, magnitudes, weight = dora_case()
    wanted = dora_formula(stack, magnitudes, weight)
    asked = []

    def rows(start, stop):
        asked.append((start, stop))
        return weight[start:stop]

    monkeypatch.setattr(_dense, "BLOCK_ENTRIES", 3 * 11 * 5)
    found = dora_updates(stack, magnitudes, rows)
    assert not asked
    assert relative(found.dense(), wanted) < 1e-14
    assert asked == [(0, 5), (5, 10), (10, 13)]
    assert relative(torch.cat(list(row_blocks(found)), 1), wanted) < 1e-14


def test_dora_keeps_its_digits_near_the_base():
    """A magnitude off by 1e-6 in float32: m V / |V| - W would lose it in the rounding of W."""
    _, _, weight = dora_case(n=1, d=64, k=256)
    stack = LoRAFactors(torch.zeros(1, 1, 256), torch.zeros(1, 64, 1))
    norms = weight.float().double().norm(dim=1)
    found = dora_updates(stack, (norms * (1 + 1e-6))[None], lambda start, stop: weight[start:stop].float()).dense()[0]
    assert relative(found.double(), weight * 1e-6) < 1e-3


def test_dora_of_a_row_without_direction():
    stack = LoRAFactors(torch.zeros(1, 1, 3), torch.zeros(1, 2, 1))
    weight = torch.tensor([[0.0, 0, 0], [3, 4, 0]])
    found = dora_updates(stack, torch.tensor([[0.0, 10.0]]), lambda start, stop: weight[start:stop]).dense()[0]
    torch.testing.assert_close(found, torch.tensor([[0.0, 0, 0], [3, 4, 0]]))


@pytest.mark.parametrize("what", ["B", "magnitudes"])
def test_sums_that_overflow_are_refused(what):
    """Seed 416 of the benchmark of adapters: the SVD of what came out did not converge."""
    stack, magnitudes, weight = dora_case(n=1)
    stack, magnitudes, weight = LoRAFactors(stack.A.float(), stack.B.float()), magnitudes.float(), weight.float()
    (stack.B if what == "B" else magnitudes)[0, 1] = 3e38
    weight[1] *= 0.01 if what == "magnitudes" else 1
    if what == "magnitudes":
        stack.B[0, 1] = 0
    with pytest.raises(ValueError, match="overflows: it holds values far too large"):
        dense(dora_updates(stack, magnitudes, lambda start, stop: weight[start:stop]))


def test_magnitudes_of_another_shape_are_refused():
    stack, magnitudes, _ = dora_case()
    with pytest.raises(ValueError, match=r"shape \(N, D\) = \(3, 13\), got \(3, 12\)"):
        dora_updates(stack, magnitudes[:, :12], lambda start, stop: torch.zeros(1))


@pytest.mark.parametrize("method", ["soup", "seedlora", "ties", "karcher"])
def test_rules_keep_their_laws_on_dora(method):
    stack, magnitudes, weight = dora_case()
    rows = lambda start, stop: weight[start:stop]  # noqa: E731
    options = {"density": 1.0} if method == "ties" else {}
    rule = METHODS[method].rule
    found = dense(rule(dora_updates(stack, magnitudes, rows), **options))
    other = dora_updates(LoRAFactors(stack.A.flip(0), stack.B.flip(0)), magnitudes.flip(0), rows)
    assert relative(dense(rule(other, **options)), found) < 1e-9
    one = dora_updates(LoRAFactors(stack.A[:1], stack.B[:1]), magnitudes[:1], rows)
    assert relative(dense(rule(one, **options)), dora_formula(stack, magnitudes, weight)[0]) < 1e-9
