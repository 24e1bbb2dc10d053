"""The choice of a run, settled on validation scores."""

from __future__ import annotations

import json
import math

import torch

from seedlora.selection.comparison import Comparison
from seedlora.selection.settling import settle
from tests.helpers.scored_layers import row_scores, stacks


def test_a_loss_that_is_no_number_is_never_chosen_nor_written():
    stack = stacks()
    bad = {path: factors.dense()[1] for path, factors in stack.items()}

    def score(adapters):
        alike = {
            name: all(torch.allclose(layers[path].dense()[0], bad[path]) for path in layers)
            for name, layers in adapters.items()
        }
        return {name: row_scores(math.nan if alike[name] else 1.0, 0.5) for name in adapters}

    for merge in ("auto", "auto_gain", "greedy_soup", "seedlora"):
        settled = settle(Comparison(merge, controls="untrained"), stack, ["seed_1", "seed_2", "seed_3"], score)
        rule, found = settled.rule, settled.selection
        json.dumps(found, allow_nan=False)
        assert found["best_seed"] == "seed_1"
        assert "seed_2" not in found["scores"]
        assert "seed_2" in found["not_finite"]
        assert found["controls"]["greedy_soup"]["members"][0] != 1
        assert found["against"]["soup"]["value"] == 0
        assert rule.name == (merge if merge == "seedlora" else "soup" if merge != "greedy_soup" else merge)
