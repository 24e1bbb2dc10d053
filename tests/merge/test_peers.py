"""soup, ties and dare against PEFT's own helpers, fed with dense updates; mergekit where it is installed."""

import pytest
import torch
from peft.utils import merge_utils

from seedlora.merge import METHODS
from tests.merge.cases import dense, dense_list, make_stack, masks, relative

STACK = make_stack(n=3, r=2, d=17, k=23)
UPDATES = dense_list(STACK)
ONES, MEAN = torch.ones(3, dtype=torch.float64), torch.full((3,), 1 / 3, dtype=torch.float64)


def test_soup():
    assert relative(dense(METHODS["soup"].rule(STACK)), merge_utils.task_arithmetic(UPDATES, MEAN)) < 1e-12


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 0.99])
def test_ties(density):
    found = dense(METHODS["ties"].rule(STACK, density=density))
    assert relative(found, merge_utils.ties(UPDATES, ONES, density)) < 1e-12


@pytest.mark.parametrize("p", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_dare_with_the_same_masks(name, p, monkeypatch):
    drawn = iter(masks((3, 17, 23), p))
    monkeypatch.setattr(torch, "bernoulli", lambda probabilities=None, **given: next(drawn))
    weights = MEAN if name == "dare_linear" else ONES
    wanted = getattr(merge_utils, name)(UPDATES, weights, density=1 - p)
    assert relative(dense(METHODS[name].rule(STACK, p=p)), wanted) < 1e-12


def test_dare_drops_as_often_as_asked():
    drawn = masks((1, 400, 500), 0.9).double()
    assert abs(float(drawn.mean()) - 0.1) < 5 * (0.09 / drawn.numel()) ** 0.5


def test_mergekit_sce_and_karcher():
    sce = pytest.importorskip("mergekit.merge_methods.sce", reason="mergekit is not installed")
    found = dense(METHODS["sce"].rule(STACK))
    assert relative(found, sce.sce_merge(UPDATES, torch.zeros_like(UPDATES[0]))) < 1e-6
