"""The candidates that are chosen among, against dense formulas."""

from __future__ import annotations

import torch

from seedlora.merge.layers import merge_stacks
from seedlora.merge.registry import make_rule
from seedlora.selection.candidates import any_method, gain_family, scaled_soups, seed_times_gain, subsets
from seedlora.selection.choice import describe_rule
from seedlora.updates.stacks import select_adapters
from tests.helpers.scored_layers import ATTENTION, FFN, stacks


def test_the_gain_family_is_the_dense_formula_on_its_layers():
    stack = stacks()
    found = gain_family(list(stack))
    assert len(found) == 1 + 3 * 5
    dense = {path: factors.dense() for path, factors in stack.items()}
    mean = {path: delta.mean(0) for path, delta in dense.items()}
    rho = {path: mean[path].norm() / delta.flatten(1).norm(dim=1).mean() for path, delta in dense.items()}
    for name, attention, ffn in (
        ("soup", 0, 0),
        ("seedlora_gain p=0.75", 0.75, 0.75),
        ("seedlora_gain p=1.25 on attention", 1.25, 0),
        ("seedlora_gain p=0.25 on ffn", 0, 0.25),
    ):
        fused = merge_stacks(stack, found[name])
        for path, p in ((ATTENTION, attention), (FFN, ffn)):
            expected = min(2.0, float(rho[path]) ** (-2 * p)) * mean[path]
            assert torch.allclose(fused[path].dense()[0], expected), name


def test_layers_of_one_kind_have_no_parts_to_try():
    assert len(gain_family([FFN])) == 6
    merge_stacks({FFN: stacks()[FFN]}, gain_family([FFN])["seedlora_gain p=0.25"])


def test_scaled_soups_and_all_candidates():
    stack = stacks()
    found = scaled_soups(3)
    fused = merge_stacks(stack, found["soup x 1.4"])
    assert torch.allclose(fused[FFN].dense()[0], 1.4 * stack[FFN].dense().mean(0))
    everything = any_method(list(stack), 3)
    assert {*gain_family(list(stack)), *found, "seedlora", "knots_ties"} <= set(everything)
    assert describe_rule(everything["soup x 1.2"]) == {"method": "task_arithmetic", "options": {"scale": 1.2 / 3}}
    part = describe_rule(everything["seedlora_gain p=0.5 on ffn"])["options"]
    assert part == {"p": 0.5, "layers": "ffn", "rest": "soup"}


def test_one_seed_gets_the_length_that_the_fused_adapter_has_over_the_mean():
    stack = stacks()
    fused = merge_stacks(stack, make_rule("seedlora"))
    single = seed_times_gain(stack, fused, index=1)
    for path, factors in stack.items():
        dense = factors.dense()
        gain = fused[path].dense().norm() / dense.mean(0).norm()
        assert torch.allclose(single[path].dense()[0], gain * dense[1])
    same = seed_times_gain(stack, merge_stacks(stack, make_rule("soup")), index=0)
    assert torch.allclose(same[FFN].dense()[0], stack[FFN].dense()[0])


def test_subsets_are_all_while_they_are_few_and_always_the_same():
    assert subsets(3) == [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
    many = subsets(12, most=10)
    assert many == subsets(12, most=10)
    assert [sum(len(s) == size for s in many) for size in (1, 2, 6, 11, 12)] == [10, 10, 10, 10, 1]
    assert len(set(many)) == len(many)
    kept = select_adapters(stacks(), (2, 0))[FFN]
    assert torch.equal(kept.A, stacks()[FFN].A[[2, 0]])
