"""Losses of the tokens that are scored."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

IGNORED = -100


def next_tokens(labels: Int[Tensor, "M T"]) -> tuple[Int[Tensor, " S"], Tensor, Int[Tensor, " S"]]:
    """The tokens that are scored, where they are predicted (the position before each), and the places of these.

    The places are those in the rows one after the other. How many there are is what a GPU's host has to wait for; with
    them at hand, nothing that follows asks again, as a mask would in each use and once more in the backward pass.
    """
    following = labels.roll(-1, dims=1)
    keep = following != IGNORED
    keep[:, -1] = False
    at = keep.flatten().nonzero()[:, 0]
    return following.flatten()[at], keep, at


def in_place(
    losses: Float[Tensor, " S"], right: Tensor | None, keep: Tensor, at: Int[Tensor, " S"]
) -> tuple[Float[Tensor, "M T"], Tensor]:
    """Losses and outcomes at the positions kept, 0 and True elsewhere."""
    all_right = torch.ones_like(keep)
    return (
        losses.new_zeros(keep.numel()).index_put((at,), losses).view(keep.shape),
        all_right if right is None else all_right.flatten().index_put((at,), right).view(keep.shape),
    )
