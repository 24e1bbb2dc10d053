"""Clip the gradient of each replica on its own norm, over all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor

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
    if not strategy.deepspeed_engine.is_gradient_accumulation_boundary():
        return
    parts = [[_local_gradient(parameter) for parameter in group] for group in groups]
    squares = torch.stack([_sum_of_squares(part, strategy.root_device) for part in parts])
    if strategy.world_size > 1:
        torch.distributed.all_reduce(squares)
    for part, norm in zip(parts, squares.sqrt(), strict=True):
        # As torch.nn.utils.clip_grad_norm_ does it.
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in part:
            if gradient is not None:
                gradient.mul_(factor.to(gradient.device))


def _local_gradient(parameter: Any) -> Tensor | None:
    """The part of a gradient, averaged over ranks and micro-batches, that this rank's optimizer will use: a view.

    ``deepspeed.utils.safe_get_full_grad`` gathers whole gradients, with one collective for each parameter.
    """
    if hasattr(parameter, "ds_id"):
        gradient, _ = parameter._z3_optimizer._get_fp32_grad_state_partition(parameter, release_swap_buffers=False)
        return gradient
    if parameter._hp_mapping is None:
        return None  # another rank's
    return parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)


def _sum_of_squares(part: Iterable[Tensor | None], device: torch.device) -> Tensor:
    squares = [gradient.float().square().sum().to(device) for gradient in part if gradient is not None]
    return torch.stack(squares).sum() if squares else torch.zeros((), device=device)
