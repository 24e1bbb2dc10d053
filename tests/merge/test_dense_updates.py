"""Updates of full rank: every rule that takes them against the reference."""

from __future__ import annotations

import pytest
import torch

from seedlora.merge.layers import merge_stacks, merged_updates
from seedlora.merge.registry import METHODS, make_rule
from seedlora.updates import dense as _dense
from seedlora.updates.dense import DenseUpdates, dense_update
from tests.helpers.merge_cases import CASES, as_dense, dense, make_stack, options_for
from tests.helpers.precision import relative

TAKES_DENSE = [name for name, case in CASES.items() if METHODS[case.method].dense]


@pytest.mark.parametrize("name", CASES)
def test_the_table_says_which_rules_give_dense_updates_of_factors(name):
    case, stack = CASES[name], make_stack()
    found = METHODS[case.method].rule(stack, **options_for(case, stack))
    assert isinstance(found, DenseUpdates) == METHODS[case.method].elementwise


@pytest.mark.parametrize("name", TAKES_DENSE)
def test_rules_on_dense_updates_are_their_formulas(name, monkeypatch):
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
def test_every_rule_merges_dense_updates_as_it_merges_their_factors(name):
    """At a rank that holds all of an update, dense updates merge to what their factors merge to."""
    stack = make_stack(n=2, r=2, d=13, k=11)
    options = {"rank": 11, "match_norm": False, **SAME_FOR_ANY_FACTORS.get(name, {})}
    found = merge_stacks({"a.mlp.up_proj": as_dense(stack)}, make_rule(name, options))
    wanted = dict(merged_updates({"a.mlp.up_proj": stack}, make_rule(name, options)))["a.mlp.up_proj"]
    assert relative(found["a.mlp.up_proj"].dense()[0], dense(wanted)) < 1e-6
    assert bool(found.inputs) == (not METHODS[name].dense)
    assert all(error < 1e-6 for error in found.inputs.values())


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


def test_a_rule_of_ones_own_may_give_a_dense_update():
    """The largest value per entry: a toy element-wise rule."""

    def largest(stack):
        return dense_update(stack, lambda: lambda block: block.max(0).values)

    ((_, update),) = merged_updates({"a": make_stack()}, largest)
    assert torch.allclose(update.dense(), make_stack().dense().max(0).values)
