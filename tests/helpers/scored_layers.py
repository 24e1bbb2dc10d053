"""Adapters of two layers, and scores as validation rows would give them."""

from __future__ import annotations

import torch

from seedlora.scores.row_scores import RowScores
from seedlora.updates.factors import LoRAFactors

ATTENTION, FFN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"


def stacks(n: int = 3) -> dict[str, LoRAFactors]:
    """Make n adapters with something in common, in float64."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    common = draw(1, 4, 7), draw(1, 5, 4)
    return {
        path: LoRAFactors(draw(n, 4, 7) + common[0], draw(n, 5, 4) + common[1]).to(torch.float64)
        for path in (ATTENTION, FFN)
    }


def row_scores(loss: float, match: float = 0.0, n: int = 10) -> RowScores:
    """Make the scores of n rows of two tokens: their loss per token, and the share that matches."""
    return RowScores(torch.full((n,), 2 * loss), torch.arange(n) < match * n, torch.full((n,), 2))
