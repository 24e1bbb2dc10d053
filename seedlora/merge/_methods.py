"""The table of merge methods, and how a name with options becomes a function."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

from seedlora.factors import LoRAFactors
from seedlora.merge._seedlora import seedlora
from seedlora.merge._soup import soup

#: What every merge rule is: the stack of one layer in, one adapter out.
MergeRule: TypeAlias = Callable[[LoRAFactors], LoRAFactors]


@dataclass(frozen=True)
class Method:
    """One row of the table: a rule, what it does in a line, and where it comes from."""

    rule: Callable[..., LoRAFactors]
    formula: str
    source: str

    @property
    def options(self) -> dict[str, Any]:
        """Names and defaults of the rule's keyword options."""
        parameters = list(inspect.signature(self.rule).parameters.values())[1:]
        return {p.name: p.default for p in parameters}


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "seedlora": Method(seedlora, "mean update, rescaled to the seeds' mean and spread", "SeedLoRA, eq. 4-5"),
        "soup": Method(soup, "mean of the updates", "Wortsman et al., arXiv 2203.05482"),
    }
)


def bind(method: str | MergeRule, options: Mapping[str, Any] | None = None) -> MergeRule:
    """Turn a method's name and its options into a function of the stack alone, checking both now.

    Args:
        method: a key of :data:`METHODS`, or any callable that takes a :class:`LoRAFactors` first.
        options: keyword options of that method.

    Raises:
        ValueError: for an unknown name, or an option that the method does not have.
    """
    options = dict(options or {})
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"Unknown merge method '{method}'; choose one of {', '.join(sorted(METHODS))}")
        allowed = METHODS[method].options
        if unknown := sorted(set(options) - set(allowed)):
            raise ValueError(
                f"Merge method '{method}' has no option {', '.join(map(repr, unknown))}; "
                f"it takes {', '.join(sorted(allowed)) or 'none'}"
            )
        method = METHODS[method].rule
    return functools.partial(method, **options) if options else method
