"""Clip the gradient of each replica on its own norm, over all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor

from seedlora.distributed.deepspeed_internals import is_last_micro_batch, local_gradient

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy


def clip_gradients(
    groups: Iterable[Sequence[torch.nn.Parameter]], *, max_norm: float, algorithm: str | None, strategy: Strategy | None
) -> None:
    """Clip each group of parameters on its own norm, over all ranks, before an optimizer step.

    Under DDP every rank has the whole gradient. Under ZeRO it has a part, and the groups' squared norms are summed over
    the ranks in one collective of as many numbers as there are groups.

    Args:
        groups: the parameters of one replica each.
        max_norm: what a larger norm is scaled to; or the largest absolute value, if ``algorithm`` is ``value``.
        algorithm: ``value``, or ``norm`` and ``None``.
        strategy: which holds the gradients; ``None`` is one process.
    """
    if not isinstance(strategy, DeepSpeedStrategy):
        clip: Any = torch.nn.utils.clip_grad_value_ if algorithm == "value" else torch.nn.utils.clip_grad_norm_
        for group in groups:
            clip(group, max_norm)
        return
    # Lightning calls this after every micro-batch; there are gradients after the last one of a step.
    if not is_last_micro_batch(strategy):
        return
    parts = [[local_gradient(parameter) for parameter in group] for group in groups]
    squares = torch.stack([_sum_of_squares(part, strategy.root_device) for part in parts])
    if strategy.world_size > 1:
        torch.distributed.all_reduce(squares)
    for part, norm in zip(parts, squares.sqrt(), strict=True):
        # As torch.nn.utils.clip_grad_norm_ does it.
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in part:
            if gradient is not None:
                gradient.mul_(factor.to(gradient.device))


def _sum_of_squares(part: Iterable[Tensor | None], device: torch.device) -> Tensor:
    squares = [gradient.float().square().sum().to(device) for gradient in part if gradient is not None]
    return torch.stack(squares).sum() if squares else torch.zeros((), device=device)
