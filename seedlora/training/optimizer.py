"""The optimizer, and the schedule of each of its groups."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from seedlora.adapters.stack import ADAPTER_PARTS
from seedlora.training.schedule import rate_schedule

if TYPE_CHECKING:
    from seedlora.adapters.stack import AdapterStack
    from seedlora.training.model_options import ModelOptions
    from seedlora.training.replicas import Replica


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


def make_optimizer(groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
    """Make one optimizer over all replicas, which handles each tensor by itself: none of them knows of the others."""
    return groups[0].options.optimizer_choice.make(
        [
            {"params": group.parameters, "lr": group.learning_rate, "weight_decay": group.options.weight_decay}
            for group in groups
        ]
    )


def make_schedule(optimizer: torch.optim.Optimizer, groups: Sequence[ParameterGroup], *, total: int) -> LambdaLR:
    """Make the schedule of each group's learning rate, stepped once per optimizer step.

    Args:
        optimizer: whose rates it sets.
        groups: of the optimizer.
        total: optimizer steps of the run.
    """
    return LambdaLR(optimizer, [rate_schedule(group.options, total=total) for group in groups])
