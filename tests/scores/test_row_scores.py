"""Scores of rows."""

from __future__ import annotations

import torch

from seedlora.scores.row_scores import RowScores


def test_losses_are_per_token_and_matches_per_row():
    found = RowScores(torch.tensor([3.0, 1.0]), torch.tensor([True, False]), torch.tensor([1, 7]))
    assert (found.loss, found.match) == (0.5, 0.5)
