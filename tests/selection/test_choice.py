"""The choice among candidates by a validation score."""

from __future__ import annotations

import math

import pytest
import torch

from seedlora.merge.layers import merge_stacks
from seedlora.selection.candidates import scaled_soups
from seedlora.selection.choice import choose, describe_rule, greedy_soup, score_rules
from tests.helpers.scored_layers import FFN, row_scores, stacks


def test_the_best_score_is_chosen_and_the_first_of_equals():
    scores = {
        "a": row_scores(1.0, 0.4),
        "b": row_scores(0.9, 0.3),
        "c": row_scores(0.9, 0.4),
        "d": row_scores(math.nan, 1.0),
    }
    assert choose(scores) == "b"  # the first of equals
    assert choose(scores, by="match") == "c"  # as many as a, at a lower loss
    with pytest.raises(ValueError, match="Unknown select_by 'lose'; choose one of loss, match"):
        choose(scores, by="lose")
    with pytest.raises(ValueError, match="none of d has a finite validation loss"):
        choose({"d": scores["d"]})


def test_candidates_are_scored_a_few_at_a_time():
    stack, groups = stacks(), []

    def score(adapters):
        groups.append(len(adapters))
        # The loss is the distance from 1.6 times the soup.
        goal = 1.6 * stack[FFN].dense().mean(0)
        return {name: row_scores(float((layers[FFN].dense()[0] - goal).norm())) for name, layers in adapters.items()}

    scores = score_rules(stack, scaled_soups(3), score, at_once=3)
    assert groups == [3, 3, 1]
    assert choose(scores) == "soup x 1.6"


def test_a_greedy_soup_leaves_out_who_harms():
    stack = stacks()
    goal = stack[FFN].dense()[[0, 2]].mean(0)

    def score(adapters):
        return {name: row_scores(float((layers[FFN].dense()[0] - goal).norm())) for name, layers in adapters.items()}

    rule = greedy_soup(stack, score)
    assert sorted(rule.options["members"]) == [0, 2]
    assert torch.allclose(merge_stacks(stack, rule)[FFN].dense()[0], goal)
    assert describe_rule(rule)["method"] == "greedy_soup"
