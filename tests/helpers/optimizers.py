"""Optimizers as users write them."""

from __future__ import annotations

import torch


class SharedNorm(torch.optim.SGD):
    """Divides every gradient by the norm of all: what one tensor learns depends on the others."""

    @torch.no_grad()
    def step(self, closure=None):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        for gradient in gradients:
            gradient.div_(norm)
        return super().step(closure)


class NoRate(torch.optim.Optimizer):
    """Has no learning rate."""

    def __init__(self, params, speed=1.0):
        super().__init__(params, {"speed": speed})


class SignMomentum(torch.optim.Optimizer):
    """Goes by the sign of a mean of gradients, written as people write optimizers: a loop over parameters."""

    def __init__(self, params, lr=1e-3, decay=0.9, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "decay": decay, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                mean = state.setdefault("mean", torch.zeros_like(parameter))
                mean.lerp_(parameter.grad, 1 - group["decay"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(mean.div(mean.abs() + 1e-6), alpha=-group["lr"])
        return loss
