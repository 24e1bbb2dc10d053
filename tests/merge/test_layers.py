"""Rules over the layers of a model: which layers, facts about the whole model, threads, and what comes out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from seedlora.merge.bound_rule import Method
from seedlora.merge.layers import layer_threads, merge_stacks, merged_updates
from seedlora.merge.methods.soup import soup
from seedlora.merge.registry import METHODS, make_rule
from seedlora.updates.compression import compress
from seedlora.updates.dense import dense_update
from seedlora.updates.factors import LoRAFactors
from tests.helpers import reference as ref
from tests.helpers.merge_cases import dense, dense_list, make_stack
from tests.helpers.precision import relative

STACKS = {
    "model.layers.0.self_attn.q_proj": make_stack(d=8, k=8, seed=1),
    "model.layers.0.mlp.up_proj": make_stack(d=12, k=8, seed=2),
    "model.layers.1.mlp.up_proj": LoRAFactors(make_stack(d=12, k=8, seed=3).A, 3 * make_stack(d=12, k=8, seed=3).B),
}


def global_limits(matrices, density):
    """Per adapter, one threshold over the matrices of all layers."""
    n = len(matrices[0])
    return [ref.top_magnitudes(torch.cat([m[i].flatten() for m in matrices]), density) for i in range(n)]


def test_knots_trims_over_all_layers():
    c = [ref.knots_matrices(dense_list(s))[1] for s in STACKS.values()]
    limits = global_limits(c, 0.2)
    fused = merge_stacks(STACKS, make_rule("knots_ties"))
    for path, stack in STACKS.items():
        assert relative(fused[path].dense()[0], ref.knots_ties(dense_list(stack), limits=limits)) < 1e-6


def test_ties_trims_over_all_layers_when_asked():
    limits = global_limits([dense_list(s) for s in STACKS.values()], 0.3)
    for path, update in merged_updates(STACKS, make_rule("ties", {"density": 0.3, "scope": "model"})):
        assert relative(dense(update), ref.ties(dense_list(STACKS[path]), limits=limits)) < 1e-9


def test_core_ties_trims_over_all_layers_when_asked():
    parts = {p: (list(s.B), list(s.A)) for p, s in STACKS.items()}
    limits = global_limits([ref.core_matrices(*p)[2] for p in parts.values()], 0.4)
    fused = merge_stacks(STACKS, make_rule("core_ties", {"density": 0.4, "scope": "model"}))
    for path, part in parts.items():
        assert relative(fused[path].dense()[0], ref.core_ties(*part, limits=limits)) < 1e-6


def test_greedy_soup_keeps_what_helps():
    target = STACKS["model.layers.0.mlp.up_proj"].dense()[1]
    seen = []

    def score(layers):
        seen.append(layers)
        return -float((layers["model.layers.0.mlp.up_proj"].dense()[0] - target).norm())

    fused = merge_stacks(STACKS, make_rule("greedy_soup", {"score": score}))
    for path, stack in STACKS.items():
        assert relative(fused[path].dense()[0], stack.dense()[1]) < 1e-12
    assert len(seen) == 5


@pytest.mark.parametrize("rest", ["soup", "nothing"])
def test_layers_that_are_left_out_get_the_rule_for_the_rest(rest):
    fused = merge_stacks(STACKS, make_rule("task_arithmetic", {"scale": 1.0, "layers": "ffn", "rest": rest}))
    q = "model.layers.0.self_attn.q_proj"
    wanted = ref.soup(dense_list(STACKS[q])) * (rest == "soup")
    assert torch.allclose(fused[q].dense()[0], wanted)
    up = "model.layers.1.mlp.up_proj"
    assert torch.allclose(fused[up].dense()[0], sum(dense_list(STACKS[up])))


def test_thresholds_are_those_of_the_chosen_layers():
    chosen = {path: stack for path, stack in STACKS.items() if "mlp" in path}
    some = merge_stacks(STACKS, make_rule("knots_ties", {"layers": "ffn", "rest": "nothing"}))
    for path, factors in merge_stacks(chosen, make_rule("knots_ties")).items():
        assert relative(some[path].dense()[0], factors.dense()[0]) < 1e-12


def test_a_choice_of_no_layer_is_refused():
    with pytest.raises(ValueError, match="selects none of 3 layers"):
        merge_stacks(STACKS, make_rule("soup", {"layers": "conv", "rest": "nothing"}))


def test_any_callable_is_a_method():
    fused = merge_stacks(STACKS, lambda stack: soup(stack, weights=[3.0, 0.0, 0.0]))
    for path, stack in STACKS.items():
        assert torch.allclose(fused[path].dense()[0], stack.dense()[0])
    assert not fused.compression


@pytest.mark.parametrize("options", [{}, {"rank": 2}])
def test_a_rule_gives_one_update(options):
    with pytest.raises(ValueError, match="'keep_all' must give one update per layer, gave 3"):
        merge_stacks(STACKS, make_rule(keep_all, options))
    for stack in (make_stack(), dense_update(make_stack(), lambda: lambda block: block[0]).to(torch.float32)):
        two = stack if isinstance(stack, LoRAFactors) else replace(stack, count=2)
        with pytest.raises(ValueError, match=f"one update can be compressed at a time, got {len(two)}"):
            compress(two, 2)


def keep_all(stack):
    return stack


def test_a_method_of_ones_own_may_survey_the_model():
    """The largest norm over all layers, which no layer knows alone."""

    def largest(walk):
        return max(float(stack.dense().norm()) for _, stack in walk())

    def relative_soup(stack, *, norm):
        return soup(LoRAFactors(stack.A, stack.B / norm))

    fused = merge_stacks(STACKS, make_rule(Method(relative_soup, "", "", surveys={"norm": largest})))
    norm = max(float(s.dense().norm()) for s in STACKS.values())
    for path, stack in STACKS.items():
        assert torch.allclose(fused[path].dense()[0], stack.dense().mean(0) / norm)


def test_random_layers_do_not_depend_on_each_other():
    bound = make_rule("dare_linear", {"seed": 4})
    few = {"model.layers.1.mlp.up_proj": STACKS["model.layers.1.mlp.up_proj"]}
    everything = dict(merged_updates(STACKS, bound))
    for path, update in merged_updates(few, bound):
        assert torch.equal(update.dense(), everything[path].dense())
    same = {"a": STACKS["model.layers.0.mlp.up_proj"], "b": STACKS["model.layers.0.mlp.up_proj"]}
    one, two = (update.dense() for _, update in merged_updates(same, bound))
    assert not torch.equal(one, two)


def test_seedlora_compressed_keeps_its_norm_and_says_so():
    fused = merge_stacks(STACKS, make_rule("seedlora", {"rank": 2}))
    assert set(fused.compression) == set(STACKS)
    for path, stack in STACKS.items():
        wanted = ref.seedlora(dense_list(stack))
        assert float(fused[path].dense().norm()) == pytest.approx(float(wanted.norm()))
        assert relative(fused[path].dense()[0], wanted) == pytest.approx(fused.compression[path], abs=1e-7)


def test_dense_rules_come_out_at_the_rank_of_the_factors():
    fused = merge_stacks(STACKS, make_rule("ties"))
    assert {factors.rank for factors in fused.values()} == {6}
    for path, stack in STACKS.items():
        assert relative(fused[path].dense()[0], ref.ties(dense_list(stack))) == pytest.approx(
            fused.compression[path], abs=1e-6
        )


@pytest.mark.parametrize("options", [{}, {"rank": 3}])
@pytest.mark.parametrize("name", sorted(set(METHODS) - {"greedy_soup"}))
def test_layers_in_threads_have_the_bits_of_a_loop(name, options):
    before, done = torch.get_num_threads(), []
    stacks = {f"model.layers.{i}.mlp.up_proj": make_stack(seed=i) for i in range(9)}
    torch.set_num_threads(3)
    try:
        with layer_threads() as each:
            threaded = merge_stacks(stacks, make_rule(name, options), on_layer=done.append, each=each)
        assert torch.get_num_threads() == 3
        torch.set_num_threads(1)
        alone = merge_stacks(stacks, make_rule(name, options))
    finally:
        torch.set_num_threads(before)
    assert done == list(threaded) == list(stacks)
    assert threaded.compression == alone.compression
    assert all(torch.equal(f.A, alone[path].A) and torch.equal(f.B, alone[path].B) for path, f in threaded.items())
