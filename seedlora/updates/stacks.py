"""The updates of several adapters, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

from torch import Tensor

from seedlora.updates.dense import Updates
from seedlora.updates.factors import LoRAFactors

_Form = TypeVar("_Form", bound=Updates)


@dataclass(frozen=True, eq=False)
class Stacks(Mapping[str, _Form]):
    """The updates of ``N`` adapters by layer path, and the weights that the adapters have in full.

    It reads as a mapping from layer paths to updates, so that whoever has no full weights may pass a dict in its place.

    Args:
        layers: the updates of all adapters, by layer path.
        modules: full weights by key within the model, one tensor of each adapter; empty unless modules are trained in
            full.
    """

    layers: Mapping[str, _Form]
    modules: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)

    def __getitem__(self, path: str) -> _Form:
        """Return the updates of one layer."""
        return self.layers[path]

    def __iter__(self) -> Iterator[str]:
        """Give the layer paths."""
        return iter(self.layers)

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self.layers)


def full_weights(layers: Mapping[str, Updates]) -> Mapping[str, Sequence[Tensor]]:
    """Return the full weights that come with these updates; none for a plain dict."""
    return layers.modules if isinstance(layers, Stacks) else {}


def join_stacks(first: Stacks[LoRAFactors], second: Stacks[LoRAFactors]) -> Stacks[LoRAFactors]:
    """Put the adapters of one stack before those of another, of the same layers, on the device of the second."""
    return Stacks(
        {path: LoRAFactors.stack([first[path].to(factors.device), factors]) for path, factors in second.items()},
        {key: [*(t.to(each[0].device) for t in first.modules[key]), *each] for key, each in second.modules.items()},
    )


#: One adapter: ``N = 1`` factors by layer path; :class:`seedlora.updates.stacks.Stacks` if it has full weights too.
Layers: TypeAlias = Mapping[str, LoRAFactors]


def select_adapters(stacks: Layers, chosen: Sequence[int]) -> Stacks[LoRAFactors]:
    """Return the stacks of the chosen adapters alone, in the order given."""
    index = list(chosen)
    return Stacks(
        {path: LoRAFactors(stack.A[index], stack.B[index]) for path, stack in stacks.items()},
        {key: [each[i] for i in index] for key, each in full_weights(stacks).items()},
    )
