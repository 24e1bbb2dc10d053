"""The steps that drop entries."""

from __future__ import annotations

import pytest
import torch

from seedlora.merge.steps.sparsify import drop, magnitude_thresholds
from tests.helpers import reference as ref


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_thresholds_are_exact(density, dtype):
    values = torch.randn(2, 5000, generator=torch.Generator().manual_seed(1)).to(dtype) * torch.tensor([[1e-6], [30.0]])
    values[:, :700] = 0
    found = magnitude_thresholds(lambda step: values.to(dtype)[:, ::step].split(999, dim=1), density)
    for row, limit in zip(values.to(dtype), found, strict=True):
        assert float(limit) == ref.top_magnitudes(row, density)


def test_dare_drops_as_often_as_asked():
    drawn = (drop(torch.ones(1, 400, 500), 0.9, torch.Generator().manual_seed(0)) > 0).double()
    assert abs(float(drawn.mean()) - 0.1) < 5 * (0.09 / drawn.numel()) ** 0.5
