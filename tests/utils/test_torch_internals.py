"""What is used of torch beyond its documentation is still there: one test for each use, named after it."""

from __future__ import annotations

import torch

from seedlora.utils import torch_internals


class TestTorch:
    def test_write_count(self):
        tensor = torch.zeros(2)
        before = torch_internals.write_count(tensor)
        assert torch_internals.write_count(tensor) == before
        tensor.add_(1)
        assert torch_internals.write_count(tensor) > before

    def test_tensors_within(self):
        a, b, c = torch.zeros(3, 1).unbind()
        assert [id(x) for x in torch_internals.tensors_within((a, [b, 1]), {"x": c})] == [id(a), id(b), id(c)]

    def test_mark_rows_static(self):
        tensor = torch.zeros(2, 3)
        torch_internals.mark_rows_static(tensor)
        assert tensor._dynamo_static_indices == {0}

    def test_raise_recompile_limit(self):
        config = torch._dynamo.config
        with config.patch(recompile_limit=8):
            torch_internals.raise_recompile_limit(9)
            assert config.recompile_limit == 9
            torch_internals.raise_recompile_limit(3)
            assert config.recompile_limit == 9

    def test_cpu_multiplies_bfloat16(self):
        assert torch_internals.cpu_multiplies_bfloat16() in (True, False)
