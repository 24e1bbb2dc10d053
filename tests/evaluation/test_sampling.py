"""Tokens are drawn as often as the probabilities say."""

from __future__ import annotations

import pytest
import torch

from seedlora.evaluation.sampling import Sampling

LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, -3.0])
DRAWS = 20_000


@pytest.mark.parametrize(
    ("options", "kept"),
    [({}, 5), ({"temperature": 0.5}, 5), ({"top_k": 2}, 2), ({"top_p": 0.7}, 2), ({"top_k": 4, "top_p": 0.9}, 3)],
)
def test_frequencies_are_the_probabilities(options, kept):
    sampling = Sampling(**{"temperature": 1.0, "seed": 3} | options)
    wanted = (LOGITS.double() / sampling.temperature).softmax(-1)
    wanted[kept:] = 0
    wanted /= wanted.sum()
    drawn = sampling.picker()(LOGITS.expand(DRAWS, -1))
    found = torch.bincount(drawn, minlength=5).double() / DRAWS
    # Four standard errors of each frequency.
    assert bool(((found - wanted).abs() <= 4 * (wanted * (1 - wanted) / DRAWS).sqrt()).all()), found


def test_greedy_draws_nothing():
    assert Sampling().picker() is None
