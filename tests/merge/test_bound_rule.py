"""Rules with their options bound: what is refused, and which layers they are for."""

from __future__ import annotations

import pickle

import pytest
import torch

from seedlora.merge.registry import make_rule
from tests.helpers import reference as ref
from tests.helpers.merge_cases import dense_list, make_stack
from tests.helpers.precision import relative


def test_greedy_soup_needs_a_score():
    with pytest.raises(ValueError, match="needs the option 'score'"):
        make_rule("greedy_soup")


#: Paths of adapted layers, as the models of transformers name them.
ATTENTION = """
    model.layers.0.self_attn.q_proj model.layers.0.self_attn.o_proj model.layers.0.self_attn.kv_a_proj_with_mqa
    model.layers.0.linear_attn.in_proj_qkvz model.layers.0.linear_attn.in_proj_ba model.layers.0.linear_attn.out_proj
    transformer.h.0.attn.c_attn transformer.h.0.attn.c_proj transformer.h.0.self_attention.query_key_value
    gpt_neox.layers.0.attention.query_key_value model.decoder.layers.0.encoder_attn.out_proj
    decoder.block.0.layer.0.SelfAttention.q decoder.block.0.layer.1.EncDecAttention.o visual.blocks.0.attn.qkv
    bert.encoder.layer.0.attention.self.query model.layers.0.self_attn.qkv_proj
"""
FFN = """
    model.layers.0.mlp.gate_proj model.layers.0.mlp.gate_up_proj model.layers.0.mlp.experts.3.down_proj
    model.layers.0.block_sparse_moe.experts.0.w1 model.layers.0.mlp.shared_expert.up_proj transformer.h.0.mlp.c_proj
    gpt_neox.layers.0.mlp.dense_h_to_4h decoder.block.0.layer.2.DenseReluDense.wi_0 model.decoder.layers.0.fc1
    transformer.blocks.0.ffn.up_proj
"""
NEITHER = "lm_head model.embed_tokens score multi_modal_projector.linear_1"


@pytest.mark.parametrize(
    ("layers", "paths"),
    [(layers, paths.split()) for layers, paths in (("attention", ATTENTION), ("ffn", FFN), ("neither", NEITHER))],
)
def test_attention_and_ffn_are_found_in_known_models(layers, paths):
    for path in paths:
        chosen = {
            name for name in ("attention", "ffn") if make_rule("soup", {"layers": name, "rest": "soup"}).selects(path)
        }
        assert chosen == {layers} - {"neither"}, path


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("tie", {}, "Unknown merge method 'tie'; choose one of core_ties, dare_linear"),
        ("ties", {"densty": 0.2}, r"'ties' has no option 'densty'; it takes density, layers, match_norm, rank"),
        ("ties", {"density": 0}, r"density must be a number in \(0, 1\], got 0"),
        ("ties", {"density": "much"}, "density must be a number"),
        ("knots_ties", {"scope": "word"}, "scope must be one of 'layer', 'model', got 'word'"),
        ("dare_ties", {"p": 1.0}, r"p must be a number"),
        ("della", {"density": 0.1}, "must lie in"),
        ("seedlora", {"layers": "ffn"}, "say rest='soup'"),
        ("seedlora", {"layers": "(", "rest": "soup"}, "regular expression"),
        ("seedlora", {"rank": 0}, "rank must be a positive integer, got 0"),
        ("seedlora", {"svd": "fast"}, "svd must be one of"),
        ("seedlora", {"seed": -1}, "seed must be a whole number"),
        ("seedlora", {"weights": [1.0, float("nan")]}, "weights must be 2 finite numbers"),
        ("seedlora", {"weights": 3}, "weights must be 1 finite numbers"),
        ("seedlora", {"weights": "equal"}, "'seedlora'"),
        ("soup", {"weights": [0, 0, 0]}, "'soup': weights must not all be 0, which merges nothing"),
        ("soup", {"weights": [True, False]}, "'soup': weights must be a list of numbers"),
        ("soup", {"weights": {"a": 1}}, "'soup': weights must be a list of numbers, one per adapter, got {'a': 1}"),
        ("task_arithmetic", {"scale": float("nan")}, "'task_arithmetic': its result is not finite with scale=nan"),
        (
            "ties",
            {"density": 0.5, "scale": float("nan")},
            "'ties': its result is not finite with density=0.5, scale=nan",
        ),
        ("iso_c", {"scale": float("inf")}, "'iso_c': its result is not finite with scale=inf"),
    ],
)
def test_bad_options_fail_when_bound(method, options, message):
    with pytest.raises(ValueError, match=message):
        make_rule(method, options)


def test_bound_rules_travel_to_other_processes():
    bound = pickle.loads(pickle.dumps(make_rule("knots_ties", {"density": 0.3, "layers": "ffn", "rest": "soup"})))
    assert torch.equal(bound(make_stack()).A, make_rule("knots_ties", {"density": 0.3})(make_stack()).A)


def test_a_bound_rule_merges_one_layer():
    stack = make_stack()
    assert make_rule("ties")(stack).rank == 6
    assert relative(make_rule("soup")(stack).dense()[0], ref.soup(dense_list(stack))) < 1e-12
