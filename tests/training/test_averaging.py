"""When replicas are averaged, the outer step, and the error of averaging factors."""

from __future__ import annotations

import pytest
import torch

from seedlora.training.averaging import OuterStep, averaging_error, averaging_steps, mean_weights
from seedlora.updates.factors import LoRAFactors


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_rounds_are_equal_unless_they_grow_as_the_rate_falls():
    assert averaging_steps(10, 3) == (3, 6, 9)
    # none after the last step, where a rule merges
    assert averaging_steps(9, 3) == (3, 6)
    assert averaging_steps(3, 5) == ()
    steps = averaging_steps(100, 5, growth=1.0, rate=lambda step: 1 - step / 100)
    rounds = [after - before for before, after in zip((0, *steps), steps, strict=False)]
    assert rounds == sorted(rounds)
    assert rounds[0] == 5
    assert rounds[-1] > 5
    # a round begins at a rate, and takes (growth / rate)^2 steps
    assert averaging_steps(1000, 1, growth=6.0, rate=lambda _: 2.0)[:3] == (9, 18, 27)
    assert averaging_steps(10, 3, growth=0.1, rate=lambda _: 2.0) == averaging_steps(10, 3)
    # a rate of 0 makes no more of them
    assert averaging_steps(20, 3, growth=1.0, rate=lambda step: float(step < 5)) == (3, 6)


@pytest.mark.parametrize(("rate", "momentum"), [(0.7, 0.9), (1.0, 0.0), (0.3, 0.5)])
def test_the_outer_step_is_that_of_torch(rate, momentum):
    parameter = torch.nn.Parameter(draw(4, 3))
    wanted = torch.optim.SGD([parameter], lr=rate, momentum=momentum, nesterov=momentum > 0)
    outer = OuterStep([parameter.detach()], rate=rate, momentum=momentum)
    for step in range(4):
        reached = parameter.detach() + draw(4, 3, seed=step + 1)
        parameter.grad = parameter.detach() - reached
        wanted.step()
        (found,) = outer.take([reached])
        torch.testing.assert_close(found, parameter.detach())


def test_an_outer_rate_of_1_without_momentum_takes_the_mean_itself():
    outer = OuterStep([draw(3)], rate=1.0, momentum=0.0)
    (found,) = outer.take([draw(3, seed=5)])
    torch.testing.assert_close(found, draw(3, seed=5))


def test_the_error_is_the_relative_distance_from_the_mean_update():
    a, b = draw(3, 2, 7), draw(3, 5, 2, seed=1)
    mean = mean_weights([[a[i], b[i]] for i in range(3)])
    replicas, averaged = {"q": LoRAFactors(a, b)}, {"q": LoRAFactors(mean[0][None], mean[1][None])}
    dense = (b @ a).mean(0)
    wanted = float((mean[1] @ mean[0] - dense).norm() / dense.norm())
    assert averaging_error(replicas, averaged) == pytest.approx(wanted)
    # of equal replicas, and where one factor is shared, the mean of the factors is that of the updates
    same = LoRAFactors(a[:1].expand(3, -1, -1), b)
    shared = {"q": LoRAFactors(a[:1], b.mean(0, keepdim=True))}
    assert averaging_error({"q": same}, shared) == pytest.approx(0, abs=1e-7)
    assert averaging_error({"q": LoRAFactors(a, 0 * b)}, {"q": LoRAFactors(a[:1], 0 * b[:1])}) == 0
