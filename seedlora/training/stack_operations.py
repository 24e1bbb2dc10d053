"""Tensor operations on all replicas of a stack: what the schemes of an ensemble are made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from seedlora.adapters.stack import AdapterStack


def parameters_side_by_side(stack: AdapterStack, names: Iterable[str]) -> Iterator[tuple[nn.Parameter, ...]]:
    """Give each parameter of the replicas, the same one of all of them at a time."""
    yield from zip(*(stack.parameters(name) for name in names), strict=True)


@torch.no_grad()
def share_gradients(stack: AdapterStack, names: Iterable[str]) -> None:
    """Give each replica the sum of the gradients of all, so that equal replicas stay equal, to the bit."""
    for same in parameters_side_by_side(stack, names):
        gradients = [parameter.grad for parameter in same if parameter.grad is not None]
        if not gradients:
            continue
        total = torch.stack(gradients).sum(0)
        for parameter in same:
            parameter.grad = total.clone()


@torch.no_grad()
def move_mean(mean: Sequence[Tensor], weights: Sequence[Tensor], *, decay: float, step: int) -> None:
    r"""Take the weights of a step into their exponential mean.

    .. math:: m_t = \frac{\sum_{i \le t} d^{t-i} w_i}{\sum_{i \le t} d^{t-i}}, \quad
        m_t = m_{t-1} + \frac{1-d}{1-d^t} (w_t - m_{t-1})

    Args:
        mean: of the steps before; anything before the first.
        weights: after this step.
        decay: d.
        step: t, from 1.
    """
    part = (1 - decay) / (1 - decay**step)
    torch._foreach_lerp_(list(mean), list(weights), part)


@contextmanager
def holding(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """Have parameters hold other values inside."""
    with torch.no_grad():
        before = [parameter.detach().clone() for parameter in parameters]
        put(parameters, values)
        try:
            yield
        finally:
            put(parameters, before)


@torch.no_grad()
def put(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Put values into parameters, or other tensors."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def copied(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Copy tensors to the CPU."""
    return [parameter.detach().cpu().clone() for parameter in parameters]
