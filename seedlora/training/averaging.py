"""Average replicas while they train: when it is done, the outer step that may follow, and the error that it makes.

Shape legend: ``N`` replicas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from seedlora.updates.algebra import gram
from seedlora.updates.factors import LoRAFactors

#: Of the outer Nesterov step, as DiLoCo has it (arXiv 2311.08105).
OUTER_MOMENTUM = 0.9


def averaging_steps(
    total: int, every: int, *, growth: float | None = None, rate: Callable[[int], float] = lambda _: 1.0
) -> tuple[int, ...]:
    r"""Return the optimizer steps after which replicas are averaged; none after the last one, where a rule merges them.

    A round takes ``every`` steps, or as many more as the learning rate :math:`\eta` at its start is lower than
    ``growth``: :math:`H = \max(H_0, (\alpha / \eta)^2)`, the quadratic synchronization rule (arXiv 2310.14423).

    Args:
        total: steps of the fit.
        every: H_0.
        growth: alpha, in the unit of the rate; None keeps rounds equal.
        rate: the learning rate of an optimizer step, from 0.

    Example:
        >>> averaging_steps(10, 4), averaging_steps(40, 4, growth=2.0, rate=lambda step: 1 - step / 40)
        ((4, 8), (4, 8, 14, 23))
    """
    steps: list[int] = []
    step = 0
    while True:
        now = rate(step)
        longer = 0 if growth is None else math.inf if now == 0 else (growth / now) ** 2
        if step + max(every, longer) >= total:
            return tuple(steps)
        step += max(every, int(longer))
        steps.append(step)


@torch.no_grad()
def mean_weights(weights: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return the mean of each parameter over replicas.

    Args:
        weights: of each replica its parameters, in one order.
    """
    return [torch.stack(list(same)).mean(0) for same in zip(*weights, strict=True)]


class OuterStep:
    r"""Takes the mean of the replicas for a step of an optimizer of its own: SGD with Nesterov's momentum.

    .. math:: g = \theta - \bar\theta, \quad v \leftarrow \mu v + g, \quad \theta \leftarrow \theta - \eta (g + \mu v)

    Args:
        start: theta, from which all replicas go.
        rate: eta; 1 without momentum gives the mean itself.
        momentum: mu.
    """

    def __init__(self, start: Sequence[Tensor], *, rate: float, momentum: float = OUTER_MOMENTUM) -> None:
        self._rate, self._momentum = rate, momentum
        self.weights = [tensor.detach().clone() for tensor in start]
        self.velocity = [torch.zeros_like(tensor) for tensor in start]

    @torch.no_grad()
    def take(self, mean: Sequence[Tensor]) -> list[Tensor]:
        """Return the weights from which all replicas go on, given the mean of where they have come."""
        for weight, velocity, reached in zip(self.weights, self.velocity, mean, strict=True):
            gradient = weight - reached
            velocity.mul_(self._momentum).add_(gradient)
            weight.sub_(self._rate * (gradient + self._momentum * velocity))
        return [weight.clone() for weight in self.weights]


def averaging_error(replicas: Mapping[str, LoRAFactors], averaged: Mapping[str, LoRAFactors]) -> float:
    r"""Return how far the product of averaged factors is from the mean of the updates, relative to that mean.

    .. math:: \sqrt{\frac{\sum_l \|\bar B_l \bar A_l - \frac1N \sum_n B_{nl} A_{nl}\|^2}
        {\sum_l \|\frac1N \sum_n B_{nl} A_{nl}\|^2}}

    Args:
        replicas: the updates of every layer by path, before.
        averaged: those of the mean of the factors.
    """
    apart = whole = 0.0
    for path, stack in replicas.items():
        n = len(stack)
        grams = gram(LoRAFactors.stack([stack, averaged[path]]))
        mean = torch.cat([torch.full((n,), 1 / n), torch.zeros(1)]).to(grams)
        difference = mean.clone()
        difference[n] = -1
        apart += float(difference @ grams @ difference)
        whole += float(mean @ grams @ mean)
    return math.sqrt(max(apart, 0.0) / whole) if whole else 0.0
