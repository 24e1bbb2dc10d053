"""Task arithmetic (Ilharco et al., ICLR 2023): add the updates."""

from __future__ import annotations

import torch

from seedlora.updates.algebra import weighted_sum
from seedlora.updates.dense import AnyUpdates


def task_arithmetic(stack: AnyUpdates, *, scale: float | None = None) -> AnyUpdates:
    r"""Add the updates, scaled by one number: :math:`\Delta = \lambda \sum_n \Delta_n`.

    Costs one copy of the factors.

    Args:
        stack: the adapters of one layer.
        scale: :math:`\lambda`. Default: ``1 / N``, which is soup; adapters of one task point the same way, and their
            plain sum would be ``N`` times too long.

    Returns:
        One adapter of rank ``N*R``, in the dtypes of ``stack``.

    References:
        Ilharco et al., "Editing models with task arithmetic", arXiv 2212.04089.
    """
    scale = 1 / len(stack) if scale is None else scale
    return weighted_sum(stack, torch.full((len(stack),), float(scale), dtype=torch.float64))
