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

    Example:
        >>> import torch
        >>> from seedlora import LoRAFactors
        >>> stack = LoRAFactors(A=torch.tensor([[[4.0, 1, 0]], [[2.0, -3, 1]]]), B=torch.ones(2, 1, 1))
        >>> task_arithmetic(stack, scale=1.0).dense()
        tensor([[[ 6., -2.,  1.]]])
    """
    scale = 1 / len(stack) if scale is None else scale
    return weighted_sum(stack, torch.full((len(stack),), float(scale), dtype=torch.float64))
