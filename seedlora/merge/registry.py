"""Turn the name of a merge method and its options into a rule."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

import torch

from seedlora.merge.bound_rule import BoundRule, MergeRule, Method
from seedlora.merge.common_options import COMMON_DEFAULTS, CommonOptions
from seedlora.merge.method_table import METHOD_TABLE, REQUIRED, MethodRow, check_method
from seedlora.updates.factors import LoRAFactors


def _method(row: MethodRow) -> Method:
    """Return a row of the table with its functions in the place of their names."""
    surveys = {keyword: _function(name) for keyword, name in row.surveys.items()}
    return Method(
        _function(row.rule),
        row.formula,
        row.source,
        surveys=surveys,
        match_norm=row.match_norm,
        dense=row.dense,
        elementwise=row.elementwise,
    )


def _function(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(".")
    found: Callable[..., Any] = getattr(import_module(f"seedlora.merge.methods.{module}"), function)
    return found


METHODS: Mapping[str, Method] = MappingProxyType({name: _method(row) for name, row in METHOD_TABLE.items()})


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
    required = {key for key, default in own.items() if default is REQUIRED}
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
    check_method(method)
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
