"""Stacks to test on, and every method of the table beside its reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from seedlora.updates.dense import DenseUpdates, Updates
from seedlora.updates.factors import LoRAFactors
from tests.helpers import reference as ref


def make_stack(n=3, r=2, d=7, k=9, *, alpha=5.0, seed=0, dtype=torch.float64) -> LoRAFactors:
    """Adapters of one task: a common part and one of their own each, scaling alpha / r folded into B."""
    g = torch.Generator().manual_seed(1000 * seed + 100 * n + 10 * r + d)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    a = draw(1, r, k) * 0.8 + 0.6 * draw(n, r, k) + 0.05
    b = draw(1, d, r) * 0.8 + 0.6 * draw(n, d, r)
    return LoRAFactors(a.to(dtype), (b * (alpha / r)).to(dtype))


def dense(update: Updates) -> Tensor:
    """The merged update as one float64 matrix."""
    return (update.to(torch.float64) if isinstance(update, LoRAFactors) else update).dense()[0].double()


def dense_list(stack: LoRAFactors) -> list[Tensor]:
    return list(stack.to(torch.float64).dense())


@dataclass(frozen=True)
class Case:
    """A method with options, and the same from the formulas."""

    method: str
    reference: Callable[[LoRAFactors], Tensor]
    options: dict[str, Any] = field(default_factory=dict)


def _total(s: LoRAFactors) -> int:
    return len(s) * s.rank


def _factors(s: LoRAFactors) -> tuple[list[Tensor], list[Tensor]]:
    s = s.to(torch.float64)
    return list(s.B), list(s.A)


def _dare(s, combine, p=0.5):
    u = dense_list(s)
    return combine(u, list(ref.dare_masks((len(u), *u[0].shape), p)), p)


def _dare_ties(s, p=0.5):
    return _dare(s, lambda u, m, p: ref.masked_ties(u, m, [1 - p] * len(u)), p)


def _knots_dare(s, p=0.5):
    """The masks depend on the shape of the aligned updates, not on their values."""
    u, c = ref.knots_matrices(dense_list(s))
    drawn = ref.dare_masks((len(c), *c[0].shape), p)
    return u @ ref.masked_ties(c, list(drawn), [1 - p] * len(c))


def _della(s, density=0.5, epsilon=0.15):
    u = dense_list(s)
    keep = [ref.della_probabilities(x, density, epsilon) for x in u]
    return ref.masked_ties(u, list(ref.della_masks(u, density, epsilon)), keep)


CASES = {
    "seedlora": Case("seedlora", lambda s: ref.seedlora(dense_list(s))),
    "seedlora weights": Case(
        "seedlora",
        lambda s: ref.seedlora(dense_list(s), weights=[1.0 + i for i in range(len(s))]),
        {"weights": "ascending"},
    ),
    "seedlora no shift": Case(
        "seedlora", lambda s: ref.seedlora(dense_list(s), mean_shift=False), {"mean_shift": False}
    ),
    "seedlora_gain": Case("seedlora_gain", lambda s: ref.seedlora_gain(dense_list(s))),
    "seedlora_gain p=1.25": Case(
        "seedlora_gain", lambda s: ref.seedlora_gain(dense_list(s), p=1.25, cap=1.2), {"p": 1.25, "cap": 1.2}
    ),
    "seedlora_subspace": Case("seedlora_subspace", lambda s: ref.seedlora_subspace(dense_list(s), _total(s))),
    "seedlora_subspace mean": Case(
        "seedlora_subspace",
        lambda s: ref.seedlora_subspace(dense_list(s), 2, 0.7, "mean"),
        {"quantile": 0.7, "subspace_rank": 2, "z_merge": "mean"},
    ),
    "seedlora_subspace trimmed": Case(
        "seedlora_subspace",
        lambda s: ref.seedlora_subspace(dense_list(s), 2, z_density=0.5),
        {"subspace_rank": 2, "z_density": 0.5},
    ),
    "seedlora_subspace dare": Case(
        "seedlora_subspace",
        lambda s: ref.seedlora_subspace(dense_list(s), 2, z_merge="dare", p=0.3),
        {"subspace_rank": 2, "z_merge": "dare", "p": 0.3},
    ),
    "soup": Case("soup", lambda s: ref.soup(dense_list(s))),
    "soup weights": Case(
        "soup", lambda s: ref.soup(dense_list(s), [1.0 + i for i in range(len(s))]), {"weights": "ascending"}
    ),
    "greedy_soup": Case("greedy_soup", lambda s: ref.soup(dense_list(s)[-1:]), {"members": "last"}),
    "task_arithmetic": Case("task_arithmetic", lambda s: ref.task_arithmetic(dense_list(s))),
    "task_arithmetic sum": Case("task_arithmetic", lambda s: ref.task_arithmetic(dense_list(s), 1.0), {"scale": 1.0}),
    "ties": Case("ties", lambda s: ref.ties(dense_list(s))),
    "ties dense": Case("ties", lambda s: ref.ties(dense_list(s), 1.0, 0.7), {"density": 1.0, "scale": 0.7}),
    "dare_linear": Case("dare_linear", lambda s: _dare(s, ref.masked_mean)),
    "dare_linear p": Case("dare_linear", lambda s: _dare(s, ref.masked_mean, 0.9), {"p": 0.9}),
    "dare_ties": Case("dare_ties", _dare_ties),
    "dare_ties p": Case("dare_ties", lambda s: _dare_ties(s, 0.3), {"p": 0.3}),
    "dare_ties scale": Case("dare_ties", lambda s: 0.7 * _dare_ties(s), {"scale": 0.7}),
    "della": Case("della", _della),
    "della density": Case("della", lambda s: _della(s, 0.7), {"density": 0.7}),
    "della epsilon": Case("della", lambda s: _della(s, epsilon=0.4), {"epsilon": 0.4}),
    "della scale": Case("della", lambda s: 0.7 * _della(s), {"scale": 0.7}),
    "model_stock": Case("model_stock", lambda s: ref.model_stock(dense_list(s))),
    "karcher": Case("karcher", lambda s: ref.karcher(dense_list(s), 10, 1e-5)),
    "karcher converged": Case("karcher", lambda s: ref.karcher(dense_list(s)), {"max_iter": 100, "tol": 1e-12}),
    "karcher one step": Case("karcher", lambda s: ref.karcher(dense_list(s), 1), {"max_iter": 1}),
    "sce": Case("sce", lambda s: ref.sce(dense_list(s))),
    "sce top": Case("sce", lambda s: ref.sce(dense_list(s), 0.4), {"select_topk": 0.4}),
    "tsv_m": Case("tsv_m", lambda s: ref.tsv_m(dense_list(s), s.rank)),
    "tsv_m k": Case("tsv_m", lambda s: ref.tsv_m(dense_list(s), 1), {"k": 1}),
    "tsv_m scale": Case("tsv_m", lambda s: 0.7 * ref.tsv_m(dense_list(s), s.rank), {"scale": 0.7}),
    "iso_c": Case("iso_c", lambda s: ref.iso_c(dense_list(s), _total(s))),
    "iso_c scale": Case("iso_c", lambda s: ref.iso_c(dense_list(s), _total(s), 0.7), {"scale": 0.7}),
    "core_ties": Case("core_ties", lambda s: ref.core_ties(*_factors(s))),
    "core_ties trimmed": Case("core_ties", lambda s: ref.core_ties(*_factors(s), 0.5), {"density": 0.5}),
    "core_ties updates": Case("core_ties", lambda s: ref.core_ties(*_factors(s), 1.0, "updates"), {"basis": "updates"}),
    "core_ties scale": Case("core_ties", lambda s: 0.7 * ref.core_ties(*_factors(s)), {"scale": 0.7}),
    "knots_ties": Case("knots_ties", lambda s: ref.knots_ties(dense_list(s))),
    "knots_ties scale": Case("knots_ties", lambda s: 0.7 * ref.knots_ties(dense_list(s)), {"scale": 0.7}),
    "knots_ties dense": Case("knots_ties", lambda s: ref.knots_ties(dense_list(s), 1.0), {"density": 1.0}),
    "knots_dare_ties": Case("knots_dare_ties", _knots_dare),
    "knots_dare_ties p": Case("knots_dare_ties", lambda s: _knots_dare(s, 0.3), {"p": 0.3}),
    "knots_dare_ties scale": Case("knots_dare_ties", lambda s: 0.7 * _knots_dare(s), {"scale": 0.7}),
    "seedft": Case("seedft", lambda s: ref.seedft(dense_list(s))),
}


def options_for(case: Case, stack: LoRAFactors) -> dict[str, Any]:
    """The case's options, with those that depend on the number of adapters filled in."""
    filled = {"ascending": [1.0 + i for i in range(len(stack))], "last": [len(stack) - 1]}
    return {key: filled.get(value, value) if isinstance(value, str) else value for key, value in case.options.items()}


def as_dense(stack: LoRAFactors, rows: int = 4) -> DenseUpdates:
    """The same updates without their factors."""
    whole = stack.dense()
    blocks = lambda: iter(whole.split(rows, 1))  # noqa: E731
    return DenseUpdates(stack.shape, stack.rank, stack.dtype, stack.device, blocks, count=len(stack))
