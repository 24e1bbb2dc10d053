"""The dropout of one micro-batch: whose rows draw which masks."""

from __future__ import annotations

import pytest
import torch

from seedlora.training.micro_batch import micro_batch_losses
from seedlora.training.replicas import FitSettings, Replica
from tests.helpers.models import make_module


@pytest.mark.usefixtures("float64")
def test_rows_of_replicas_that_are_one_draw_masks_of_their_own(tiny_llama):
    """Equal weights on equal rows lose the same by the same masks; a trunk, or a wide batch, has others."""
    module = make_module(tiny_llama, lora_dropout=0.5)
    # seeds from one start, as those of a trunk: only their orders differ
    module.prepare_fit(FitSettings(tuple(Replica(f"seed_{order}", 1, order) for order in (1, 2, 3))))
    module.setup("fit")
    module.model.train()
    for same in zip(*(module.stack.parameters(replica.name) for replica in module.replicas), strict=True):
        value = torch.randn(same[0].shape, generator=torch.Generator().manual_seed(0))
        for parameter in same:
            parameter.data.copy_(value)
    ids = torch.arange(2 * 6).view(1, 2, 6).expand(3, -1, -1)
    batch = {"input_ids": ids, "labels": ids, "num_items": torch.tensor([10] * 3), "lengths": [6] * 3}

    def losses(*, are_one):
        found = micro_batch_losses(
            batch,
            module.replicas,
            module.stack,
            module.token_losses,
            dropout_key=(0, 0, 0),
            are_one=are_one,
            reduce=lambda tensor: tensor,
        )
        return found.sums.detach()

    alike, apart = losses(are_one=False), losses(are_one=True)
    assert torch.allclose(alike, alike[0].expand(3), rtol=1e-12, atol=0)
    assert torch.allclose(apart[0], alike[0], rtol=1e-12, atol=0)
    assert (apart.unsqueeze(0) - apart.unsqueeze(1)).abs().add(torch.eye(3)).min() > 1e-3
    assert torch.equal(losses(are_one=True), apart)
