"""The updates of several adapters, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from torch import Tensor

from seedlora.updates.dense import Updates
from seedlora.updates.factors import LoRAFactors

_Form = TypeVar("_Form", bound=Updates)


class Stacks(dict[str, _Form]):
    """The updates of ``N`` adapters by layer path; beside them, their full weights.

    Attributes:
        modules: by key within the model, one tensor of each adapter; empty unless modules are trained in full.
    """

    def __init__(self, layers: Mapping[str, _Form], modules: Mapping[str, Sequence[Tensor]] | None = None) -> None:
        super().__init__(layers)
        self.modules = dict(modules or {})


def full_weights(layers: Mapping[str, Any]) -> Mapping[str, Sequence[Tensor]]:
    """The full weights that are beside these updates, if there are any."""
    return layers.modules if isinstance(layers, Stacks) else {}


def joined(first: Stacks[LoRAFactors], second: Stacks[LoRAFactors]) -> Stacks[LoRAFactors]:
    """The adapters of one stack and then those of another, of the same layers, on the device of the second."""
    return Stacks(
        {path: LoRAFactors.stack([first[path].to(factors.device), factors]) for path, factors in second.items()},
        {key: [*(t.to(each[0].device) for t in first.modules[key]), *each] for key, each in second.modules.items()},
    )


#: One adapter: ``N = 1`` factors by layer path; :class:`seedlora.updates.stacks.Stacks` if it has full weights too.
Layers: TypeAlias = Mapping[str, LoRAFactors]


def members(stacks: Layers, chosen: Sequence[int]) -> Stacks[LoRAFactors]:
    """The chosen adapters of every layer."""
    index = list(chosen)
    return Stacks(
        {path: LoRAFactors(stack.A[index], stack.B[index]) for path, stack in stacks.items()},
        {key: [each[i] for i in index] for key, each in full_weights(stacks).items()},
    )
