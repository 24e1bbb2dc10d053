"""Updates compressed to a rank, and the error that is said."""

from __future__ import annotations

import pytest
import torch

from seedlora.merge.layers import merge_stacks
from seedlora.merge.methods.soup import soup
from seedlora.merge.registry import make_rule
from seedlora.updates import compression as _blocks
from seedlora.updates.compression import compress, compress_each
from seedlora.updates.dense import DenseUpdates
from seedlora.updates.factors import LoRAFactors
from tests.helpers import reference as ref
from tests.helpers.merge_cases import as_dense, dense_list, make_stack
from tests.helpers.precision import relative


def a_dense_update(d=40, k=30):
    matrix = torch.randn(d, k, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stack = LoRAFactors(torch.ones(1, 2, k), torch.ones(1, d, 2))
    return matrix, DenseUpdates((d, k), 2, torch.float64, stack.B.device, lambda: iter(matrix[None].split(7, 1)))


@pytest.mark.parametrize("match_norm", [False, True])
@pytest.mark.parametrize("svd", ["exact", "randomized"])
@pytest.mark.parametrize("held", [True, False])
def test_compression_says_its_error(svd, match_norm, held, monkeypatch):
    if not held:
        monkeypatch.setattr(_blocks, "HELD_ENTRIES", 1)
    matrix, update = a_dense_update()
    found = compress(update, 5, svd=svd, match_norm=match_norm)
    result = found.factors.dense()[0]
    assert found.factors.rank == 5
    assert relative(result, matrix) == pytest.approx(found.error, rel=1e-6)
    best = ref.truncated(matrix, 5)
    if match_norm:
        assert float(result.norm()) == pytest.approx(float(matrix.norm()))
    else:
        assert relative(result, matrix) <= 1.01 * relative(best, matrix)


@pytest.mark.parametrize("match_norm", [False, True])
@pytest.mark.parametrize("svd", ["exact", "randomized"])
@pytest.mark.parametrize("tail", [0.0, 1e-5, 1e-3, 0.1])
def test_small_errors_of_float32_updates_are_exact(tail, svd, match_norm):
    """Down to the rounding of float32, where the squared norms of update and result are equal in every digit."""
    g = torch.Generator().manual_seed(0)
    matrix = torch.randn(60, 5, generator=g) @ torch.randn(5, 50, generator=g)
    matrix = matrix + tail * torch.randn(60, 50, generator=g)
    update = DenseUpdates((60, 50), 5, torch.float32, matrix.device, lambda: iter(matrix[None].split(7, 1)))
    found = compress(update, 5, svd=svd, match_norm=match_norm)
    result = found.factors.B[0].double() @ found.factors.A[0].double()
    assert found.error == pytest.approx(relative(result, matrix.double()), rel=1e-3, abs=5e-7)


@pytest.mark.parametrize("match_norm", [False, True])
def test_factors_are_compressed_optimally(match_norm):
    stack = make_stack(n=3, r=4, d=20, k=15)
    average = ref.soup(dense_list(stack))
    found = compress(soup(stack), 4, match_norm=match_norm)
    best = ref.truncated(average, 4)
    best = best * (average.norm() / best.norm()) if match_norm else best
    assert relative(found.factors.dense()[0], best) < 1e-7
    assert found.error == pytest.approx(relative(best, average), abs=1e-7)


def test_compressing_the_inputs_says_its_error():
    stack = make_stack(n=2, r=5, d=13, k=11)
    found, error = compress_each(as_dense(stack), 3)
    wanted = [torch.linalg.svdvals(update) for update in dense_list(stack)]
    assert error == pytest.approx(max(float(s[3:].norm() / s.norm()) for s in wanted), rel=1e-6)
    assert found.rank == 3
    fused = merge_stacks({"up": as_dense(stack)}, make_rule("tsv_m", {"rank": 3}))
    assert fused.inputs == pytest.approx({"up": error})
