"""Train all replicas as one for the first part of the steps: the trunk of ``ensemble.scheme branch``."""

from __future__ import annotations

import lightning.pytorch as pl
import torch

from seedlora.training.module import SeedLoRAModule
from seedlora.training.stack_operations import share_gradients


class Branch(pl.Callback):
    """Keep the replicas equal in the trunk: each gets the sum of the gradients, whose losses have one mean.

    So the trunk is one replica that sees the rows of all in each step. After it each replica goes on from there with
    its own rows, and AdamW's moments of the trunk.
    """

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, module: SeedLoRAModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Share the gradients, before they are clipped."""
        if module.are_one:
            share_gradients(module.stack, [replica.name for replica in module.replicas.active])
