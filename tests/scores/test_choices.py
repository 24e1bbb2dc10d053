"""A choice on validation rows is said with whether it is more than their noise."""

from __future__ import annotations

import pytest
import torch

from seedlora.scores.choices import choice_record, choice_sentences
from seedlora.scores.row_scores import RowScores


def rows(*losses, right=0.0):
    """Rows of four tokens: their losses, and the first part of them right."""
    n = len(losses)
    return RowScores(torch.tensor(losses), torch.arange(n) < right * n, torch.full((n,), 4))


def test_a_difference_within_its_interval_is_noise():
    generator = torch.Generator().manual_seed(0)
    base = 4 + torch.rand(24, generator=generator)
    noisy = base + 0.01 + torch.randn(24, generator=generator)
    scores = {"ties": rows(*base), "same": rows(*base), "soup": rows(*noisy), "dare": rows(*(base + 9))}
    record = choice_record("the rule", "ties", scores, by="loss")
    # what is the same adapter is no other choice
    assert (record["next"], record["difference"]["n"], record["difference"]["shown"]) == ("soup", 24, False)
    (sentence,) = choice_sentences({"by": "loss", "choices": [record]})
    assert sentence.startswith("On 24 validation rows ties was chosen as the rule: ")
    assert " against soup, the next (95 % interval " in sentence
    assert sentence.endswith("), which is within the noise of these rows.")
    record = choice_record("the rule", "ties", {"ties": scores["ties"], "dare": scores["dare"]}, by="loss")
    assert record["difference"]["shown"]
    assert record["difference"]["value"] == pytest.approx(-9 / 4)
    assert "noise" not in choice_sentences({"by": "loss", "choices": [record]})[0]


def test_by_matches_the_difference_is_of_matches():
    losses = [float(i) for i in range(100)]
    scores = {"a": rows(*losses, right=0.5), "b": rows(*losses[::-1], right=0.4), "c": rows(*losses[::-1], right=0.3)}
    record = choice_record("the best replica", "a", scores, by="match")
    assert (record["next"], record["difference"]["value"], record["difference"]["shown"]) == ("b", 0.1, True)
    assert "+10.0 points against b, the next" in choice_sentences({"by": "match", "choices": [record]})[0]


def test_what_has_no_finite_loss_is_no_other_choice():
    nan = float("nan")
    assert choice_record("the rule", "a", {"a": rows(1.0, 2.0), "b": rows(nan, 1.0)}, by="loss") is None
    assert choice_record("the rule", "a", {"a": rows(1.0, 2.0)}, by="loss") is None
    assert choice_sentences(None) == []
    assert choice_sentences({"by": "loss"}) == []
