"""The optimizer and its schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

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


class ParameterGroup(NamedTuple):
    """Holds parameters that learn at one rate.

    Attributes:
        parameters: of one replica or several.
        learning_rate: at the top of the schedule.
        options: of these replicas: the schedule and the weight decay.
    """

    parameters: Sequence[nn.Parameter]
    learning_rate: float
    options: ModelOptions


def parameter_groups(
    stack: AdapterStack, replicas: Iterable[Replica], options: ModelOptions
) -> Sequence[ParameterGroup]:
    """Sort the parameters of replicas by how they learn; with LoRA+, the factors B are groups of their own.

    Args:
        stack: that holds them.
        replicas: in the order of their parameters.
        options: of the module.
    """
    alike: dict[tuple[object, ...], list[tuple[Replica, ModelOptions]]] = {}
    for replica in replicas:
        own = options.of_replica(replica.options)
        learns = (own.learning_rate, own.lora_plus_ratio, own.weight_decay, own.lr_scheduler, own.warmup_ratio)
        alike.setdefault(learns, []).append((replica, own))

    groups = []
    for members in alike.values():
        own = members[0][1]
        rates: dict[Sequence[str], float] = {ADAPTER_PARTS: own.learning_rate}
        if own.lora_plus_ratio != 1:
            others = tuple(part for part in ADAPTER_PARTS if part != "lora_B")
            rates = {others: own.learning_rate, ("lora_B",): own.learning_rate * own.lora_plus_ratio}
        for parts, rate in rates.items():
            parameters = [parameter for replica, _ in members for parameter in stack.parameters(replica.name, parts)]
            groups.append(ParameterGroup(parameters, rate, own))
    return groups


def make_optimizer(groups: Sequence[ParameterGroup]) -> torch.optim.AdamW:
    """Make AdamW over all replicas, which it treats element by element: none of them knows of the others."""
    return torch.optim.AdamW(
        [
            {"params": group.parameters, "lr": group.learning_rate, "weight_decay": group.options.weight_decay}
            for group in groups
        ],
        lr=groups[0].learning_rate,
        weight_decay=groups[0].options.weight_decay,
        fused=True,
    )


def make_schedule(optimizer: torch.optim.Optimizer, groups: Sequence[ParameterGroup], *, total: int) -> LambdaLR:
    """Make the schedule of each group's learning rate, stepped once per optimizer step.

    Args:
        optimizer: whose rates it sets.
        groups: of the optimizer.
        total: optimizer steps of the run.
    """
    return LambdaLR(optimizer, [rate_schedule(group.options, total=total) for group in groups])


def rate_schedule(options: ModelOptions, *, total: int) -> Callable[[int], float]:
    """Return the factor on the learning rate as a function of the optimizer step.

    Args:
        options: which schedule, and its warm-up.
        total: optimizer steps of the run.
    """
    warmup = warmup_of(total, ratio=options.warmup_ratio, steps=options.warmup_steps)
    return partial(learning_rate_factor, schedule=options.lr_scheduler, warmup=warmup, total=total)


def warmup_of(total: int, *, ratio: float, steps: int | None) -> int:
    """Return the steps in which the rate grows: those given, or a part of the run's."""
    return math.ceil(ratio * total) if steps is None else steps
