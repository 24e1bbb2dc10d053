"""Every method against the dense float64 reference."""

import inspect

import pytest
import torch

from seedlora.merge.registry import METHODS
from tests.helpers.merge_cases import CASES, dense, make_stack, options_for
from tests.helpers.precision import relative

#: float64 is limited by the square root in the Gram matrices, the others by storage.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 3e-5, torch.bfloat16: 2.5e-2}


def check(name, stack):
    case = CASES[name]
    found = dense(METHODS[case.method].rule(stack, **options_for(case, stack)))
    wanted = case.reference(stack)
    assert found.shape == wanted.shape
    assert relative(found, wanted) < TOLERANCE[stack.B.dtype]


def test_every_method_has_a_reference():
    assert {case.method for case in CASES.values()} == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_every_option_has_a_case(method):
    """Those of the rule; what a survey finds in the whole model is tested in test_layers.py."""
    options = set(inspect.signature(METHODS[method].rule).parameters) - {"stack", "thresholds", "generator"}
    assert options == {key for case in CASES.values() if case.method == method for key in case.options}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", CASES)
def test_methods_are_their_formulas_for_any_number_of_adapters(name, n, dtype):
    check(name, make_stack(n=n, r=2, d=13, k=11, dtype=dtype))


@pytest.mark.parametrize("shape", [(13, 20), (20, 13)], ids=str)
@pytest.mark.parametrize("r", [1, 4])
@pytest.mark.parametrize("name", CASES)
def test_methods_are_their_formulas_at_other_ranks_and_shapes(name, r, shape):
    check(name, make_stack(n=3, r=r, d=shape[0], k=shape[1], alpha=3.0, dtype=torch.float32))


@pytest.mark.parametrize("name", CASES)
def test_methods_are_their_formulas_with_more_rank_than_the_layer_has(name):
    check(name, make_stack(n=5, r=4, d=7, k=9))
