"""List the merge methods in a table, and turn a name with options into a rule."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from seedlora.merge.bound_rule import COMMON_DEFAULTS, BoundRule, CommonOptions, MergeRule, Method
from seedlora.merge.methods.core_space import core_thresholds, core_ties
from seedlora.merge.methods.dare import dare_linear, dare_ties
from seedlora.merge.methods.della import della
from seedlora.merge.methods.iso import iso_c
from seedlora.merge.methods.karcher import karcher
from seedlora.merge.methods.knots import knots_dare_ties, knots_thresholds, knots_ties
from seedlora.merge.methods.model_stock import model_stock
from seedlora.merge.methods.sce import sce
from seedlora.merge.methods.seedft import seedft
from seedlora.merge.methods.seedlora import seedlora, seedlora_gain
from seedlora.merge.methods.soup import greedy_members, greedy_soup, soup
from seedlora.merge.methods.subspace import seedlora_subspace
from seedlora.merge.methods.task_arithmetic import task_arithmetic
from seedlora.merge.methods.ties import ties, ties_thresholds
from seedlora.merge.methods.tsv import tsv_m
from seedlora.updates.factors import LoRAFactors
from seedlora.utils.spelling import closest

#: Options that only Python can give: a function and a generator.
PYTHON_ONLY = ("generator", "score")
METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "seedlora": Method(
            seedlora,
            "mean update, rescaled to the seeds' mean and spread",
            "SeedLoRA, eq. 4-5",
            match_norm=True,
            dense=True,
        ),
        "seedlora_gain": Method(
            seedlora_gain,
            "mean update times min(rho^-2p, cap)",
            "this project, after SeedLoRA eq. 5",
            match_norm=True,
            dense=True,
        ),
        "seedlora_subspace": Method(
            seedlora_subspace,
            "large entries by majority, the others merged within the mean's subspace",
            "SeedLoRA, ICML 2025, two-stage (second-hand)",
            match_norm=True,
            elementwise=True,
        ),
        "soup": Method(soup, "mean of the updates", "Wortsman et al., arXiv 2203.05482", dense=True),
        "greedy_soup": Method(
            greedy_soup,
            "soup of the adapters that do not lower a validation score, best first",
            "Wortsman et al., arXiv 2203.05482, recipe 1",
            surveys={"members": greedy_members},
        ),
        "task_arithmetic": Method(
            task_arithmetic, "sum of the updates times scale", "Ilharco et al., arXiv 2212.04089", dense=True
        ),
        "ties": Method(
            ties,
            "trim, elect a sign per entry, mean of the entries that agree",
            "Yadav et al., arXiv 2306.01708",
            surveys={"thresholds": ties_thresholds},
            dense=True,
            elementwise=True,
        ),
        "dare_linear": Method(
            dare_linear, "drop at random, rescale, mean", "Yu et al., arXiv 2311.03099", dense=True, elementwise=True
        ),
        "dare_ties": Method(
            dare_ties,
            "drop at random, rescale, then TIES without trim",
            "Yu et al., arXiv 2311.03099",
            dense=True,
            elementwise=True,
        ),
        "della": Method(
            della,
            "drop at random by rank in the row, rescale, then TIES without trim",
            "Deep et al., arXiv 2406.11617",
            dense=True,
            elementwise=True,
        ),
        "model_stock": Method(
            model_stock,
            "mean update times Nc / (1 + (N-1)c), c the mean cosine",
            "Jang et al., arXiv 2403.19522",
            dense=True,
        ),
        "karcher": Method(karcher, "spherical mean of the directions times the mean norm", "Karcher, 1977", dense=True),
        "sce": Method(
            sce,
            "entries of largest variance, adapters weighted by energy, minority signs erased",
            "Wan et al., arXiv 2408.07990",
            dense=True,
            elementwise=True,
        ),
        "tsv_m": Method(tsv_m, "singular vectors side by side, made orthogonal", "Gargiulo et al., arXiv 2412.00081"),
        "iso_c": Method(iso_c, "SVD of the sum with all values equal", "Marczak et al., arXiv 2502.04959"),
        "core_ties": Method(
            core_ties,
            "TIES on lossless core matrices",
            "Panariello et al., arXiv 2509.17786",
            surveys={"thresholds": core_thresholds},
        ),
        "knots_ties": Method(
            knots_ties,
            "TIES in the basis of the updates side by side, trimmed over all layers",
            "Stoica et al., arXiv 2410.19735",
            surveys={"thresholds": knots_thresholds},
        ),
        "knots_dare_ties": Method(
            knots_dare_ties,
            "DARE, then TIES without trim, in the basis of the updates side by side",
            "Stoica et al., arXiv 2410.19735; Yu et al., arXiv 2311.03099",
        ),
        "seedft": Method(
            seedft, "KnOTS basis with the polar factor of the summed right vectors", "second-hand, after KnOTS"
        ),
    }
)


def make_rule(method: str | MergeRule | Method, options: Mapping[str, Any] | None = None) -> BoundRule:
    """Turn a method and its options into a function of the stack alone, checking both now.

    A method of the table is tried on a stack of a few entries, so that values out of range are found here and not
    after a training run.

    Args:
        method: a key of :data:`METHODS`, a row of one's own, or any callable that takes a :class:`LoRAFactors` first.
        options: keyword options of that method, and those of :class:`CommonOptions` that it does not have itself.

    Raises:
        ValueError: for an unknown name, an option that the method does not have, lacks, or that is out of range.

    Example:
        >>> from seedlora import LoRAFactors
        >>> rule = make_rule("ties", {"density": 0.3, "rank": 2})
        >>> METHODS["ties"].formula
        'trim, elect a sign per entry, mean of the entries that agree'
        >>> stack = LoRAFactors(A=torch.ones(3, 4, 8), B=torch.ones(3, 6, 4))
        >>> rule(stack).shape, rule(stack).rank
        ((6, 8), 2)
    """
    options = dict(options or {})
    if isinstance(method, BoundRule):
        if options:
            raise ValueError(f"Merge method '{method.name}' is bound already; it takes no more options")
        return method
    name, row = _find_method(method)
    own = row.options
    common = {key: options.pop(key) for key in COMMON_DEFAULTS if key in options and key not in own}
    anything = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(row.rule).parameters.values())
    if (unknown := sorted(set(options) - set(own))) and not anything:
        allowed = sorted({*own, *COMMON_DEFAULTS})
        raise ValueError(
            f"Merge method '{name}' has no option {', '.join(map(repr, unknown))}; it takes {', '.join(allowed)}"
        )
    required = {key for key, default in own.items() if default is inspect.Parameter.empty}
    if missing := sorted(required - set(options)):
        raise ValueError(f"Merge method '{name}' needs the option {', '.join(map(repr, missing))}")
    try:
        bound = BoundRule(name, row, options, CommonOptions(**common))
        if isinstance(method, str) and "score" not in options:
            _try_rule(bound)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:  # the last two: no number, or none for torch
        raise ValueError(f"Merge method '{name}': {error}") from None
    return bound


def _find_method(method: str | MergeRule | Method) -> tuple[str, Method]:
    """Return a method's name and its row: of the table, one's own, or one made for a callable."""
    if isinstance(method, Method):
        return method.rule.__name__, method
    if not isinstance(method, str):
        return getattr(method, "__name__", type(method).__name__), Method(method, "", "")
    if method not in METHODS:
        meant = closest(method, METHODS)
        hint = f"; did you mean '{meant}'?" if meant else ""
        raise ValueError(f"Unknown merge method '{method}'; choose one of {', '.join(sorted(METHODS))}{hint}")
    return method, METHODS[method]


def _try_rule(bound: BoundRule) -> None:
    """Apply a rule to a few entries; ``weights`` says how many adapters there will be."""
    n = 2
    if (weights := bound.options.get("weights")) is not None:
        try:
            numbers = torch.as_tensor(weights)
        except (RuntimeError, TypeError, ValueError):
            numbers = torch.zeros(0, dtype=torch.bool)
        if numbers.dtype == torch.bool:
            raise ValueError(f"weights must be a list of numbers, one per adapter, got {weights!r}")
        if not numbers.any():
            raise ValueError(f"weights must not all be 0, which merges nothing, got {weights!r}")
        n = numbers.numel()
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(n, 2, 5, generator=generator), torch.randn(n, 4, 2, generator=generator)
    options = {key: value for key, value in bound.options.items() if key != "generator"}
    rule, stack = BoundRule(bound.name, bound.method, options, bound.common), LoRAFactors(a, b)
    update = rule.update("", stack, rule.survey(lambda: [("", stack)]))
    if not bool(update.dense().isfinite().all()):
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise ValueError(f"its result is not finite with {given}")
    rule.finish("", update)
