"""Laws, for every entry of the table. A law that a method breaks by design is listed, with its reason, and checked
to be broken: the list cannot outlive its cause.
"""

import pytest
import torch

from seedlora.merge.layers import merge_stacks
from seedlora.merge.methods.soup import greedy_members
from seedlora.merge.registry import METHODS, make_rule
from seedlora.updates.factors import LoRAFactors
from tests.helpers.merge_cases import dense, make_stack
from tests.helpers.precision import relative

TRIM = "the default density drops entries of any update"
RANDOM = "entries are dropped at random"
POSITION = "the masks belong to positions in the stack; the distribution does not depend on the order"
GAUGED = "TIES depends on the basis, and the paper's basis is that of the factors; basis='updates' keeps the law"
FLAT = "all singular values are made equal"

BROKEN = {
    **{("fixed point", name): TRIM for name in ("ties", "knots_ties")},
    **{("one adapter", name): TRIM for name in ("ties", "knots_ties")},
    **{("order", name): POSITION for name in ("dare_linear", "dare_ties", "della", "knots_dare_ties")},
    **{("fixed point", name): RANDOM for name in ("dare_linear", "dare_ties", "della", "knots_dare_ties")},
    **{("one adapter", name): RANDOM for name in ("dare_linear", "dare_ties", "della", "knots_dare_ties")},
    ("gauge", "core_ties"): GAUGED,
    ("fixed point", "iso_c"): FLAT,
    ("one adapter", "iso_c"): FLAT,
}
#: The same methods with the options under which they keep the law.
KEPT = {
    ("fixed point", "ties"): {"density": 1.0},
    ("one adapter", "ties"): {"density": 1.0},
    ("fixed point", "knots_ties"): {"density": 1.0},
    ("one adapter", "knots_ties"): {"density": 1.0},
    ("gauge", "core_ties"): {"basis": "updates"},
    **{
        (law, name): {"p": 0.0}
        for law in ("fixed point", "one adapter", "order")
        for name in ("dare_linear", "dare_ties", "knots_dare_ties")
    },
}


def direction(layers):
    """A score that takes any length and sign of an update for the same: how near it is to one line."""
    update = layers["layer"].dense()[0].double()
    line = torch.randn(update.shape, generator=torch.Generator().manual_seed(14), dtype=torch.float64)
    return float((update * line).sum().abs() / update.norm().clamp_min(1e-300))


def apply(name, stack, **options):
    if name == "greedy_soup":
        return dense(merge_stacks({"layer": stack}, make_rule(name, {"score": direction}))["layer"])
    return dense(METHODS[name].rule(stack, **options))


def gauged(stack):
    g = torch.Generator().manual_seed(5)
    mix = torch.randn(len(stack), stack.rank, stack.rank, generator=g, dtype=torch.float64) + 2 * torch.eye(stack.rank)
    return LoRAFactors(mix @ stack.A, stack.B @ torch.linalg.inv(mix))


def order(name, **options):
    stack = make_stack(n=4, r=2)
    other = LoRAFactors(stack.A.flip(0), stack.B.flip(0))
    return apply(name, other, **options), apply(name, stack, **options)


def gauge(name, **options):
    stack = make_stack(n=3, r=2)
    return apply(name, gauged(stack), **options), apply(name, stack, **options)


def scaling(name, **options):
    stack = make_stack(n=3, r=2)
    return apply(name, LoRAFactors(stack.A, -2.5 * stack.B), **options), -2.5 * apply(name, stack, **options)


def fixed_point(name, **options):
    one = make_stack(n=1, r=3)
    same = LoRAFactors(one.A.expand(4, -1, -1).clone(), one.B.expand(4, -1, -1).clone())
    return apply(name, same, **options), one.dense()[0]


def one_adapter(name, **options):
    one = make_stack(n=1, r=3)
    return apply(name, one, **options), one.dense()[0]


MEMBERS = {"greedy_soup": {"members": range(2)}}
LAWS = {
    "order": order,
    "gauge": gauge,
    "scaling": scaling,
    "fixed point": fixed_point,
    "one adapter": one_adapter,
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("law", LAWS)
def test_every_method_keeps_the_law_or_breaks_it_by_design(law, name):
    error = relative(*LAWS[law](name))
    if (law, name) in BROKEN:
        assert error > 1e-3, f"{name} keeps the law '{law}'; take it off the list"
    else:
        assert error < 1e-6


@pytest.mark.parametrize(("law", "name"), KEPT)
def test_law_kept_with_options(law, name):
    assert relative(*LAWS[law](name, **KEPT[law, name])) < 1e-6


def test_greedy_soup_is_none_of_its_trivial_cases():
    """Or the laws above would hold for a soup of all, or for the best alone."""
    for n in (3, 4):
        members = greedy_members(lambda n=n: [("layer", make_stack(n=n, r=2))], score=direction)
        assert 1 < len(members) < n


FACTORED = [
    name for name in METHODS if isinstance(METHODS[name].rule(make_stack(), **MEMBERS.get(name, {})), LoRAFactors)
]


@pytest.mark.parametrize("name", FACTORED)
def test_no_matrix_of_the_size_of_a_weight_is_built(name):
    """Of 200,000 rows and columns it would have 160 GB."""
    size, g = 200_000, torch.Generator().manual_seed(0)
    stack = LoRAFactors(torch.randn(2, 1, size, generator=g), torch.randn(2, size, 1, generator=g))
    rule = make_rule(name, {"score": lambda layers: 0.0} if name == "greedy_soup" else {})
    found = merge_stacks({"layer": stack}, rule)["layer"]
    assert found.shape == (size, size)
    assert found.rank <= 3
    assert found.A.isfinite().all()
    assert found.B.isfinite().all()


@pytest.mark.parametrize("name", METHODS)
def test_inputs_untouched_and_same_bits(name):
    stack = make_stack(n=3, r=2, dtype=torch.float32)
    before = stack.A.clone(), stack.B.clone()
    random = "generator" in METHODS[name].options
    state = torch.get_rng_state()
    options = {"generator": torch.Generator().manual_seed(3)} if random else {}
    first = apply(name, stack, **options)
    options = {"generator": torch.Generator().manual_seed(3)} if random else {}
    assert torch.equal(first, apply(name, stack, **options))
    assert torch.equal(before[0], stack.A)
    assert torch.equal(before[1], stack.B)
    assert torch.equal(state, torch.get_rng_state()), "the global generator was used"


@pytest.mark.parametrize("name", [name for name in METHODS if "generator" in METHODS[name].options])
def test_other_seed_other_bits(name):
    stack = make_stack(n=3, r=2)
    options = {"z_merge": "dare"} if name == "seedlora_subspace" else {}
    one, two = (apply(name, stack, generator=torch.Generator().manual_seed(s), **options) for s in (1, 2))
    assert not torch.equal(one, two)


@pytest.mark.parametrize("name", METHODS)
def test_zero_updates_stay_zero(name):
    stack = LoRAFactors(torch.zeros(3, 2, 5), torch.zeros(3, 4, 2))
    assert torch.equal(apply(name, stack), torch.zeros(4, 5, dtype=torch.float64))


@pytest.mark.parametrize("off", [0.0, 1e-9])
@pytest.mark.parametrize("name", METHODS)
def test_opposite_adapters_give_numbers_of_their_size(name, off):
    """What is left of a mean that cancels is not scaled up: in the update, and in its factors, which are stored."""
    one = make_stack(n=1, r=2)
    noise = off * torch.randn(one.B.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    opposite = LoRAFactors(torch.cat([one.A, one.A]), torch.cat([one.B, noise - one.B]))
    update = METHODS[name].rule(opposite, **MEMBERS.get(name, {}))
    assert float(dense(update).norm()) <= 2 * float(one.dense().norm())
    if isinstance(update, LoRAFactors):
        assert float(update.B.norm() * update.A.norm()) <= 10 * float(opposite.B.norm() * opposite.A.norm())


def test_model_stock_stays_between_the_base_and_the_average():
    for cosine in (-0.9, -0.1, 0.0, 0.1, 0.9):
        a = torch.tensor([[[1.0, 0.0]], [[cosine, (1 - cosine**2) ** 0.5]]], dtype=torch.float64)
        stack = LoRAFactors(a, torch.ones(2, 1, 1, dtype=torch.float64))
        wanted = max(0.0, 2 * cosine / (1 + cosine)) * a.mean(0)
        torch.testing.assert_close(apply("model_stock", stack), wanted)
