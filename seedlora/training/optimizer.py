"""The optimizer and its schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from seedlora.adapters.stack import ADAPTER_PARTS

if TYPE_CHECKING:
    from seedlora.adapters.stack import AdapterStack
    from seedlora.training.model_options import ModelOptions
    from seedlora.training.replicas import Replica


def learning_rate_factor(step: int, schedule: str, *, warmup: int, total: int) -> float:
    r"""Return the factor on the learning rate in optimizer step ``step`` (from 0).

    :math:`(step + 1) / warmup` during the warm-up; then, with progress p from 0 to 1 over the rest,
    :math:`(1 + \cos \pi p) / 2`, :math:`1 - p` or 1.

    >>> learning_rate_factor(0, "linear", warmup=2, total=4), learning_rate_factor(3, "linear", warmup=2, total=4)
    (0.5, 0.5)
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[schedule]


def make_optimizer(stack: AdapterStack, replicas: Iterable[Replica], options: ModelOptions) -> torch.optim.AdamW:
    """Make AdamW over all replicas, which it treats element by element: none of them knows of the others.

    With LoRA+, the factors B are a group of their own, at their own rate.
    """

    def parameters(*parts: str) -> list[nn.Parameter]:
        return [parameter for replica in replicas for parameter in stack.parameters(replica.name, parts)]

    groups: list[dict[str, Any]] = [{"params": parameters(*ADAPTER_PARTS)}]
    if options.lora_plus_ratio != 1:
        rate_of_b = options.learning_rate * options.lora_plus_ratio
        others = [part for part in ADAPTER_PARTS if part != "lora_B"]
        groups = [{"params": parameters(*others)}, {"params": parameters("lora_B"), "lr": rate_of_b}]
    return torch.optim.AdamW(groups, lr=options.learning_rate, weight_decay=options.weight_decay, fused=True)


def make_schedule(optimizer: torch.optim.Optimizer, options: ModelOptions, *, total: int) -> LambdaLR:
    """Make the schedule of the learning rate, stepped once per optimizer step.

    Args:
        optimizer: whose rates it sets.
        options: which schedule, and its warm-up.
        total: optimizer steps of the run.
    """
    warmup = options.warmup_steps
    if warmup is None:
        warmup = math.ceil(options.warmup_ratio * total)
    return LambdaLR(optimizer, partial(learning_rate_factor, schedule=options.lr_scheduler, warmup=warmup, total=total))
