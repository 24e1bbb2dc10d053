"""Stacks to test on, and every method of the table beside its reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from seedlora.factors import LoRAFactors
from seedlora.merge import Updates
from seedlora.merge._sparsify import drop, drop_by_rank, stream
from tests import reference as ref


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


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-300))


def masks(shape, p) -> Tensor:
    """The masks that a rule without a generator of its own draws for one block of this shape."""
    return drop(torch.ones(shape, dtype=torch.float64), p, stream(None)()) > 0


def della_masks(stacked: Tensor, density=0.5, epsilon=0.15) -> Tensor:
    return drop_by_rank(stacked, density, epsilon, stream(None)()) != 0


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
    return combine(u, list(masks((len(u), *u[0].shape), p)), p)


def _knots_dare(s):
    """The masks depend on the shape of the aligned updates, not on their values."""
    u, c = ref.knots_matrices(dense_list(s))
    drawn = masks((len(c), *c[0].shape), 0.5)
    return u @ ref.masked_ties(c, list(drawn), [0.5] * len(c))


def _della(s):
    u = dense_list(s)
    keep = [ref.della_probabilities(x) for x in u]
    drawn = della_masks(torch.stack(u))
    return ref.masked_ties(u, list(drawn), keep)


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
    "soup": Case("soup", lambda s: ref.soup(dense_list(s))),
    "greedy_soup": Case("greedy_soup", lambda s: ref.soup(dense_list(s)[-1:]), {"members": "last"}),
    "task_arithmetic": Case("task_arithmetic", lambda s: ref.task_arithmetic(dense_list(s))),
    "task_arithmetic sum": Case("task_arithmetic", lambda s: ref.task_arithmetic(dense_list(s), 1.0), {"scale": 1.0}),
    "ties": Case("ties", lambda s: ref.ties(dense_list(s))),
    "ties dense": Case("ties", lambda s: ref.ties(dense_list(s), 1.0, 0.7), {"density": 1.0, "scale": 0.7}),
    "dare_linear": Case("dare_linear", lambda s: _dare(s, ref.masked_mean)),
    "dare_ties": Case(
        "dare_ties", lambda s: _dare(s, lambda u, m, p: ref.masked_ties(u, m, [1 - p] * len(u)), 0.3), {"p": 0.3}
    ),
    "della": Case("della", _della),
    "model_stock": Case("model_stock", lambda s: ref.model_stock(dense_list(s))),
    "karcher": Case("karcher", lambda s: ref.karcher(dense_list(s)), {"max_iter": 100, "tol": 1e-12}),
    "sce": Case("sce", lambda s: ref.sce(dense_list(s))),
    "sce top": Case("sce", lambda s: ref.sce(dense_list(s), 0.4), {"select_topk": 0.4}),
    "tsv_m": Case("tsv_m", lambda s: ref.tsv_m(dense_list(s), s.rank)),
    "iso_c": Case("iso_c", lambda s: ref.iso_c(dense_list(s), _total(s))),
    "core_ties": Case("core_ties", lambda s: ref.core_ties(*_factors(s))),
    "core_ties trimmed": Case("core_ties", lambda s: ref.core_ties(*_factors(s), 0.5), {"density": 0.5}),
    "core_ties updates": Case("core_ties", lambda s: ref.core_ties(*_factors(s), 1.0, "updates"), {"basis": "updates"}),
    "knots_ties": Case("knots_ties", lambda s: ref.knots_ties(dense_list(s))),
    "knots_ties dense": Case("knots_ties", lambda s: ref.knots_ties(dense_list(s), 1.0), {"density": 1.0}),
    "knots_dare_ties": Case("knots_dare_ties", _knots_dare),
    "seedft": Case("seedft", lambda s: ref.seedft(dense_list(s))),
}


def options_for(case: Case, stack: LoRAFactors) -> dict[str, Any]:
    """The case's options, with those that depend on the number of adapters filled in."""
    filled = {"ascending": [1.0 + i for i in range(len(stack))], "last": [len(stack) - 1]}
    return {key: filled.get(value, value) if isinstance(value, str) else value for key, value in case.options.items()}
