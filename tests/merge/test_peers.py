"""soup, ties and dare against PEFT's own helpers, fed with dense updates; mergekit where it is installed."""

from __future__ import annotations

import pytest
import torch
from peft.utils import merge_utils

from seedlora.merge.registry import METHODS
from tests.helpers.merge_cases import dense, dense_list, make_stack
from tests.helpers.precision import relative
from tests.helpers.reference import dare_masks, della_probabilities

STACK = make_stack(n=3, r=2, d=17, k=23)
UPDATES = dense_list(STACK)
ONES, MEAN = torch.ones(3, dtype=torch.float64), torch.full((3,), 1 / 3, dtype=torch.float64)


def test_soup_is_peft_s():
    assert relative(dense(METHODS["soup"].rule(STACK)), merge_utils.task_arithmetic(UPDATES, MEAN)) < 1e-12


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 0.99])
def test_ties_is_peft_s(density):
    found = dense(METHODS["ties"].rule(STACK, density=density))
    assert relative(found, merge_utils.ties(UPDATES, ONES, density)) < 1e-12


@pytest.mark.parametrize("p", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_dare_is_peft_s_with_the_same_masks(name, p, monkeypatch):
    drawn = iter(dare_masks((3, 17, 23), p))
    monkeypatch.setattr(torch, "bernoulli", lambda probabilities=None, **given: next(drawn))
    weights = MEAN if name == "dare_linear" else ONES
    wanted = getattr(merge_utils, name)(UPDATES, weights, density=1 - p)
    assert relative(dense(METHODS[name].rule(STACK, p=p)), wanted) < 1e-8  # of 32 random bits


def with_base(updates):
    """What mergekit's functions take: the base (zero here) and one tensor per model."""
    base = pytest.importorskip("mergekit.merge_methods.base", reason="mergekit is not installed")
    return base.TensorGroup.from_tensors([torch.zeros_like(updates[0]), *updates], base_index=0)


@pytest.mark.parametrize("select_topk", [1.0, 0.4])
def test_sce_is_mergekit_s(select_topk):
    group = with_base(UPDATES)
    from mergekit.merge_methods.sce import sce_merge

    (wanted,) = sce_merge([group], parameters={"select_topk": select_topk})
    assert relative(dense(METHODS["sce"].rule(STACK, select_topk=select_topk)), wanted) < 1e-6


def test_karcher_is_mergekit_s():
    karcher = pytest.importorskip("mergekit.merge_methods.karcher", reason="mergekit is not installed")
    wanted = karcher.karcher_merge_tensors(UPDATES, [1 / 3] * 3, max_iter=50, tol=1e-9)
    assert relative(dense(METHODS["karcher"].rule(STACK, max_iter=50, tol=1e-9)), wanted) < 1e-6


def test_ties_is_mergekit_s():
    sparsify = pytest.importorskip("mergekit.sparsify", reason="mergekit is not installed")
    from mergekit.merge_methods.generalized_task_arithmetic import get_mask

    kept = torch.stack([sparsify.magnitude(update.float(), 0.2).double() for update in UPDATES])
    mask = get_mask(kept, "sum")
    wanted = (kept * mask).sum(0) / mask.sum(0).clamp_min(1)
    assert relative(dense(METHODS["ties"].rule(STACK)), wanted) < 1e-6


def test_della_keeps_mergekit_s_probabilities(monkeypatch):
    """Fed with probabilities instead of draws, mergekit's mask is the probability itself."""
    sparsify = pytest.importorskip("mergekit.sparsify", reason="mergekit is not installed")
    monkeypatch.setattr(torch, "bernoulli", lambda probabilities: probabilities)
    found = sparsify.della_magprune(UPDATES[0].float(), 0.5, 0.15).double()
    assert relative(found, UPDATES[0] * della_probabilities(UPDATES[0])) < 1e-6
