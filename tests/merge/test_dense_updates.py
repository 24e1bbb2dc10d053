"""Updates of full rank: every rule that takes them against the reference, and DoRA's against its formula."""

import pytest
import torch

from seedlora.merge.layers import merge_stacks, merged_updates
from seedlora.merge.registry import METHODS, make_rule
from seedlora.updates import dense as _dense
from seedlora.updates.compression import compress_each
from seedlora.updates.dense import DenseUpdates, row_blocks
from seedlora.updates.dora import dora_updates
from seedlora.updates.factors import LoRAFactors
from tests.helpers.merge_cases import CASES, dense, dense_list, make_stack, options_for, relative

TAKES_DENSE = [name for name, case in CASES.items() if METHODS[case.method].dense]


def as_dense(stack: LoRAFactors, rows: int = 4) -> DenseUpdates:
    """The same updates without their factors."""
    whole = stack.dense()
    blocks = lambda: iter(whole.split(rows, 1))  # noqa: E731
    return DenseUpdates(stack.shape, stack.rank, stack.dtype, stack.device, blocks, count=len(stack))


@pytest.mark.parametrize("name", CASES)
def test_the_table_says_which_rules_give_dense_updates_of_factors(name):
    case, stack = CASES[name], make_stack()
    found = METHODS[case.method].rule(stack, **options_for(case, stack))
    assert isinstance(found, DenseUpdates) == METHODS[case.method].elementwise


@pytest.mark.parametrize("name", TAKES_DENSE)
def test_rules_on_dense_updates(name, monkeypatch):
    """Random masks depend on the blocks, so those of the factors are made the same."""
    case, stack = CASES[name], make_stack(n=3, r=2, d=13, k=11)
    found = METHODS[case.method].rule(as_dense(stack, rows=13), **options_for(case, stack))
    assert isinstance(found, DenseUpdates)
    assert relative(dense(found), case.reference(stack)) < 1e-6


#: Options under which a rule depends neither on the split into factors nor on the blocks of its masks.
SAME_FOR_ANY_FACTORS = {
    "core_ties": {"basis": "updates"},
    "seedlora_subspace": {"subspace_rank": 4},
    **{name: {"p": 0.0} for name in ("dare_linear", "dare_ties", "knots_dare_ties")},
    "della": {"density": 1.0, "epsilon": 0.0},
}


@pytest.mark.parametrize("name", [name for name in METHODS if name != "greedy_soup"])
def test_every_rule_fuses_them(name):
    """At a rank that holds all of an update, dense updates merge to what their factors merge to."""
    stack = make_stack(n=2, r=2, d=13, k=11)
    options = {"rank": 11, "match_norm": False, **SAME_FOR_ANY_FACTORS.get(name, {})}
    found = merge_stacks({"a.mlp.up_proj": as_dense(stack)}, make_rule(name, options))
    wanted = dict(merged_updates({"a.mlp.up_proj": stack}, make_rule(name, options)))["a.mlp.up_proj"]
    assert relative(found["a.mlp.up_proj"].dense()[0], dense(wanted)) < 1e-6
    assert bool(found.inputs) == (not METHODS[name].dense)
    assert all(error < 1e-6 for error in found.inputs.values())


def test_compressing_the_inputs_says_its_error():
    stack = make_stack(n=2, r=5, d=13, k=11)
    found, error = compress_each(as_dense(stack), 3)
    wanted = [torch.linalg.svdvals(update) for update in dense_list(stack)]
    assert error == pytest.approx(max(float(s[3:].norm() / s.norm()) for s in wanted), rel=1e-6)
    assert found.rank == 3
    fused = merge_stacks({"up": as_dense(stack)}, make_rule("tsv_m", {"rank": 3}))
    assert fused.inputs == pytest.approx({"up": error})


def dora_case(n=3, r=2, d=13, k=11, seed=0):
    stack = make_stack(n=n, r=r, d=d, k=k, seed=seed)
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(d, k, generator=g, dtype=torch.float64)
    magnitudes = weight.norm(dim=1) * (1 + 0.1 * torch.randn(n, d, generator=g, dtype=torch.float64))
    return stack, magnitudes, weight


def dora_formula(stack, magnitudes, weight):
    """Equation 5 of the paper, row by row."""
    found = torch.empty(len(stack), *weight.shape, dtype=torch.float64)
    for n in range(len(stack)):
        for i in range(len(weight)):
            row = weight[i] + stack.B[n, i] @ stack.A[n]
            found[n, i] = magnitudes[n, i] * row / row.square().sum().sqrt() - weight[i]
    return found


def test_dora_is_its_formula(monkeypatch):
    stack, magnitudes, weight = dora_case()
    wanted = dora_formula(stack, magnitudes, weight)
    asked = []

    def rows(start, stop):
        asked.append((start, stop))
        return weight[start:stop]

    monkeypatch.setattr(_dense, "BLOCK_ENTRIES", 3 * 11 * 5)
    found = dora_updates(stack, magnitudes, rows)
    assert not asked
    assert relative(found.dense(), wanted) < 1e-14
    assert asked == [(0, 5), (5, 10), (10, 13)]
    assert relative(torch.cat(list(row_blocks(found)), 1), wanted) < 1e-14


def test_dora_keeps_its_digits_near_the_base():
    """A magnitude off by 1e-6 in float32: m V / |V| - W would lose it in the rounding of W."""
    _, _, weight = dora_case(n=1, d=64, k=256)
    stack = LoRAFactors(torch.zeros(1, 1, 256), torch.zeros(1, 64, 1))
    norms = weight.float().double().norm(dim=1)
    found = dora_updates(stack, (norms * (1 + 1e-6))[None], lambda start, stop: weight[start:stop].float()).dense()[0]
    assert relative(found.double(), weight * 1e-6) < 1e-3


def test_dora_of_a_row_without_direction():
    stack = LoRAFactors(torch.zeros(1, 1, 3), torch.zeros(1, 2, 1))
    weight = torch.tensor([[0.0, 0, 0], [3, 4, 0]])
    found = dora_updates(stack, torch.tensor([[0.0, 10.0]]), lambda start, stop: weight[start:stop]).dense()[0]
    torch.testing.assert_close(found, torch.tensor([[0.0, 0, 0], [3, 4, 0]]))


def test_magnitudes_of_another_shape():
    stack, magnitudes, _ = dora_case()
    with pytest.raises(ValueError, match=r"shape \(N, D\) = \(3, 13\), got \(3, 12\)"):
        dora_updates(stack, magnitudes[:, :12], lambda start, stop: torch.zeros(1))


@pytest.mark.parametrize("method", ["soup", "seedlora", "ties", "karcher"])
def test_laws_of_dora(method):
    stack, magnitudes, weight = dora_case()
    rows = lambda start, stop: weight[start:stop]  # noqa: E731
    options = {"density": 1.0} if method == "ties" else {}
    rule = METHODS[method].rule
    found = dense(rule(dora_updates(stack, magnitudes, rows), **options))
    other = dora_updates(LoRAFactors(stack.A.flip(0), stack.B.flip(0)), magnitudes.flip(0), rows)
    assert relative(dense(rule(other, **options)), found) < 1e-9
    one = dora_updates(LoRAFactors(stack.A[:1], stack.B[:1]), magnitudes[:1], rows)
    assert relative(dense(rule(one, **options)), dora_formula(stack, magnitudes, weight)[0]) < 1e-9
