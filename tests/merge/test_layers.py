"""What belongs to no single method: options, layer choice, facts about the whole model, dense results, compression."""

import pickle
from dataclasses import replace

import pytest
import torch

from seedlora.merge.bound_rule import Method
from seedlora.merge.layers import layer_threads, merge_stacks, merged_updates
from seedlora.merge.methods.soup import soup
from seedlora.merge.registry import METHODS, make_rule
from seedlora.updates import compression as _blocks
from seedlora.updates import dense as _dense
from seedlora.updates.compression import compress
from seedlora.updates.dense import DenseUpdates, dense_update
from seedlora.updates.factors import LoRAFactors
from tests.helpers import reference as ref
from tests.helpers.merge_cases import dense, dense_list, make_stack, relative

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


def test_greedy_soup_needs_a_score():
    with pytest.raises(ValueError, match="needs the option 'score'"):
        make_rule("greedy_soup")


@pytest.mark.parametrize("rest", ["soup", "nothing"])
def test_layers_left_out(rest):
    fused = merge_stacks(STACKS, make_rule("task_arithmetic", {"scale": 1.0, "layers": "ffn", "rest": rest}))
    q = "model.layers.0.self_attn.q_proj"
    wanted = ref.soup(dense_list(STACKS[q])) * (rest == "soup")
    assert torch.allclose(fused[q].dense()[0], wanted)
    up = "model.layers.1.mlp.up_proj"
    assert torch.allclose(fused[up].dense()[0], sum(dense_list(STACKS[up])))


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
def test_layers_of_known_models(layers, paths):
    for path in paths:
        chosen = {
            name for name in ("attention", "ffn") if make_rule("soup", {"layers": name, "rest": "soup"}).selects(path)
        }
        assert chosen == {layers} - {"neither"}, path


def test_thresholds_are_those_of_the_chosen_layers():
    chosen = {path: stack for path, stack in STACKS.items() if "mlp" in path}
    some = merge_stacks(STACKS, make_rule("knots_ties", {"layers": "ffn", "rest": "nothing"}))
    for path, factors in merge_stacks(chosen, make_rule("knots_ties")).items():
        assert relative(some[path].dense()[0], factors.dense()[0]) < 1e-12


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
        ("soup", {"weights": {"a": 1}}, "'soup': weights must be numbers, one per adapter, got {'a': 1}"),
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


def test_layers_that_select_nothing():
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


def test_a_row_of_ones_own_with_a_survey():
    """The largest norm over all layers, which no layer knows alone."""

    def largest(walk):
        return max(float(stack.dense().norm()) for _, stack in walk())

    def relative_soup(stack, *, norm):
        return soup(LoRAFactors(stack.A, stack.B / norm))

    fused = merge_stacks(STACKS, make_rule(Method(relative_soup, "", "", surveys={"norm": largest})))
    norm = max(float(s.dense().norm()) for s in STACKS.values())
    for path, stack in STACKS.items():
        assert torch.allclose(fused[path].dense()[0], stack.dense().mean(0) / norm)


def test_a_bound_rule_fuses_one_layer():
    stack = make_stack()
    assert make_rule("ties")(stack).rank == 6
    assert relative(make_rule("soup")(stack).dense()[0], ref.soup(dense_list(stack))) < 1e-12


def test_random_layers_do_not_depend_on_each_other():
    bound = make_rule("dare_linear", {"seed": 4})
    few = {"model.layers.1.mlp.up_proj": STACKS["model.layers.1.mlp.up_proj"]}
    everything = dict(merged_updates(STACKS, bound))
    for path, update in merged_updates(few, bound):
        assert torch.equal(update.dense(), everything[path].dense())
    same = {"a": STACKS["model.layers.0.mlp.up_proj"], "b": STACKS["model.layers.0.mlp.up_proj"]}
    one, two = (update.dense() for _, update in merged_updates(same, bound))
    assert not torch.equal(one, two)


@pytest.mark.parametrize("name", ["ties", "sce", "seedlora_subspace", "dare_ties", "della"])
def test_row_blocks_change_nothing(name, monkeypatch):
    stack = make_stack(n=3, d=31, k=9)
    options = {"select_topk": 0.5} if name == "sce" else {}
    whole = METHODS[name].rule(stack, **options).dense()
    monkeypatch.setattr(_dense, "BLOCK_ENTRIES", 3 * 9 * 4)
    update = METHODS[name].rule(stack, **options)
    assert [block.shape[1] for block in update.blocks()] == [4] * 7 + [3]
    if name in ("dare_ties", "della"):  # other bits, but the same ones at every pass
        assert torch.equal(update.dense(), update.dense())
    else:
        assert torch.allclose(update.dense(), whole)


def a_dense_update(d=40, k=30):
    matrix = torch.randn(d, k, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stack = LoRAFactors(torch.ones(1, 2, k), torch.ones(1, d, 2))
    return matrix, DenseUpdates((d, k), 2, torch.float64, stack.B.device, lambda: iter(matrix[None].split(7, 1)))


@pytest.mark.parametrize("match_norm", [False, True])
@pytest.mark.parametrize("svd", ["exact", "randomized"])
@pytest.mark.parametrize("held", [True, False])
def test_compression_says_its_error(svd, match_norm, held, monkeypatch):
    if not held:
        monkeypatch.setattr(_blocks, "HELD_ENTRIES", 1)
    matrix, update = a_dense_update()
    found = compress(update, 5, svd=svd, match_norm=match_norm)
    result = found.factors.dense()[0]
    assert found.factors.rank == 5
    assert relative(result, matrix) == pytest.approx(found.error, rel=1e-6)
    best = ref.truncated(matrix, 5)
    if match_norm:
        assert float(result.norm()) == pytest.approx(float(matrix.norm()))
    else:
        assert relative(result, matrix) <= 1.01 * relative(best, matrix)


@pytest.mark.parametrize("match_norm", [False, True])
@pytest.mark.parametrize("svd", ["exact", "randomized"])
@pytest.mark.parametrize("tail", [0.0, 1e-5, 1e-3, 0.1])
def test_small_errors_of_float32_updates(tail, svd, match_norm):
    """Down to the rounding of float32, where the squared norms of update and result are equal in every digit."""
    g = torch.Generator().manual_seed(0)
    matrix = torch.randn(60, 5, generator=g) @ torch.randn(5, 50, generator=g)
    matrix = matrix + tail * torch.randn(60, 50, generator=g)
    update = DenseUpdates((60, 50), 5, torch.float32, matrix.device, lambda: iter(matrix[None].split(7, 1)))
    found = compress(update, 5, svd=svd, match_norm=match_norm)
    result = found.factors.B[0].double() @ found.factors.A[0].double()
    assert found.error == pytest.approx(relative(result, matrix.double()), rel=1e-3, abs=5e-7)


@pytest.mark.parametrize("match_norm", [False, True])
def test_factors_are_compressed_optimally(match_norm):
    stack = make_stack(n=3, r=4, d=20, k=15)
    average = ref.soup(dense_list(stack))
    found = compress(soup(stack), 4, match_norm=match_norm)
    best = ref.truncated(average, 4)
    best = best * (average.norm() / best.norm()) if match_norm else best
    assert relative(found.factors.dense()[0], best) < 1e-7
    assert found.error == pytest.approx(relative(best, average), abs=1e-7)


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


def test_dense_update_of_ones_own():
    """The largest value per entry: a toy element-wise rule."""

    def largest(stack):
        return dense_update(stack, lambda: lambda block: block.max(0).values)

    ((_, update),) = merged_updates({"a": make_stack()}, largest)
    assert torch.allclose(update.dense(), make_stack().dense().max(0).values)


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_thresholds_are_exact(density, dtype):
    from seedlora.merge.steps.sparsify import magnitude_thresholds

    values = torch.randn(2, 5000, generator=torch.Generator().manual_seed(1)).to(dtype) * torch.tensor([[1e-6], [30.0]])
    values[:, :700] = 0
    found = magnitude_thresholds(lambda step: values.to(dtype)[:, ::step].split(999, dim=1), density)
    for row, limit in zip(values.to(dtype), found, strict=True):
        assert float(limit) == ref.top_magnitudes(row, density)


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
