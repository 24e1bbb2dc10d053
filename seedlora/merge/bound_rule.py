"""Bind a rule to everything about its use: options, layers, rank, seed.

:func:`seedlora.merge.layers.merge_stacks` runs it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch

from seedlora.merge.common_options import LAYER_SETS, CommonOptions
from seedlora.merge.methods.soup import soup
from seedlora.merge.steps.walk import AnyWalk
from seedlora.updates.compression import Compressed, compress
from seedlora.updates.dense import Updates
from seedlora.updates.factors import LoRAFactors
from seedlora.utils.random_streams import stream_seed

#: What every merge rule is to its caller: the stack of one layer in, one adapter out.
MergeRule: TypeAlias = Callable[[LoRAFactors], LoRAFactors]


@dataclass(frozen=True)
class Method:
    """A row of the table of methods: a rule, what it does in a line, and where it comes from.

    Args:
        rule: takes a stack first, then keyword options. If it has a keyword ``generator``, it is random.
        formula: what it does, in a line.
        source: paper and equation.
        surveys: for a rule that depends on the whole model: which keyword of ``rule`` holds which fact about it. A
            survey takes a :data:`Walk` first, then keyword options of its own or of the rule.
        match_norm: whether its result keeps its norm when it is compressed, unless the caller says otherwise.
        dense: whether the rule takes :class:`~seedlora.updates.dense.DenseUpdates` as well. To one that does not,
            updates of full rank are given at their best approximation of a rank.
        elementwise: whether it gives a dense update even for factors.
    """

    rule: Callable[..., Updates]
    formula: str
    source: str
    surveys: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    match_norm: bool = False
    dense: bool = False
    elementwise: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Return names and defaults of the keyword options; ``inspect.Parameter.empty`` where one must be given."""
        found: dict[str, Any] = {}
        for function in (*self.surveys.values(), self.rule):
            for p in list(inspect.signature(function).parameters.values())[1:]:
                if p.name not in self.surveys and p.kind is not p.VAR_KEYWORD:
                    found[p.name] = p.default
        return found


@dataclass(frozen=True)
class BoundRule:
    """A method with its options, ready to be applied; itself a merge rule for a single layer.

    Args:
        name: of the method, for records.
        method: the row it came from.
        options: keyword options of the method.
        common: the options that every method has.
    """

    name: str
    method: Method
    options: Mapping[str, Any]
    common: CommonOptions

    def __call__(self, stack: LoRAFactors) -> LoRAFactors:
        """Merge one layer alone, as if the model had no other; dense results come out compressed."""
        facts = self.survey(lambda: [("", stack)])
        return self.finish("", self.update("", stack, facts)).factors

    def selects(self, path: str) -> bool:
        """Return whether the method is applied to this layer."""
        return re.search(LAYER_SETS.get(self.common.layers, self.common.layers), path) is not None

    def survey(self, walk: AnyWalk) -> dict[str, object]:
        """Return what the rule must know about the whole model, by keyword."""
        return {
            keyword: survey(
                walk, **{key: self.options[key] for key in _options_of(survey).names if key in self.options}
            )
            for keyword, survey in self.method.surveys.items()
        }

    def update(self, path: str, stack: Updates, facts: Mapping[str, object]) -> Updates:
        """Return the merged update of one selected layer, as the rule gives it.

        Raises:
            ValueError: if the rule gives anything but one update.
        """
        rule = self.method.rule
        known = _options_of(rule)
        options = {key: value for key, value in self.options.items() if known.takes_all or key in known.names}
        if "generator" in known.names and "generator" not in options:
            options["generator"] = torch.Generator().manual_seed(stream_seed(self.common.seed, path))
        update = rule(stack, **options, **facts)
        if len(update) != 1:
            raise ValueError(f"Merge method '{self.name}' must give one update per layer, gave {len(update)}")
        return update

    def left_out(self, stack: Updates) -> Updates:
        """Return the update of a layer that the method is not applied to."""
        if self.common.rest == "soup":
            average: Callable[[Any], Updates] = soup
            return average(stack)
        (d, k), dtype, device = stack.shape, stack.dtype, stack.device
        zeros = (torch.zeros(1, *shape, dtype=dtype, device=device) for shape in ((1, k), (d, 1)))
        return LoRAFactors(*zeros)

    def finish(self, path: str, update: Updates) -> Compressed:
        """Return an update as factors: unchanged, unless it is dense or of a higher rank than ``common.rank``.

        Args:
            path: of the layer; a randomised compression draws from its stream.
            update: what the rule gave, one.
        """
        rank = self.common.rank or update.rank
        if isinstance(update, LoRAFactors) and update.rank <= rank:
            return Compressed(update, 0.0)
        match_norm = self.method.match_norm if self.common.match_norm is None else self.common.match_norm
        generator = torch.Generator().manual_seed(stream_seed(self.common.seed, "svd", path))
        return compress(update, rank, match_norm=match_norm, svd=self.common.svd, generator=generator)


class _Options(NamedTuple):
    """The names of a rule's options, and whether it takes any other."""

    names: list[str]
    takes_all: bool


@lru_cache
def _options_of(function: Callable[..., object]) -> _Options:
    options = list(inspect.signature(function).parameters.values())[1:]
    return _Options([p.name for p in options], any(p.kind is p.VAR_KEYWORD for p in options))
