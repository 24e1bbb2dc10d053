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
