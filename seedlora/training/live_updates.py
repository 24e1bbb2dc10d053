"""Updates out of a stack in training, to be merged, and into it, to be scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from seedlora.updates.factors import LoRAFactors
from seedlora.updates.stacks import Layers, Stacks, full_weights

if TYPE_CHECKING:
    from seedlora.adapters.stack import AdapterStack


def read_updates(stack: AdapterStack, names: Sequence[str]) -> Stacks[LoRAFactors]:
    """Return the updates of replicas as they are now. All ranks must call it."""
    full = [stack.full_weights(name) for name in names]
    return Stacks(stack.factors(names), {key: [each[key] for each in full] for key in full[0]})


def load_updates(stack: AdapterStack, label: str, layers: Layers) -> None:
    """Put a fused adapter, with its full weights if it has any, beside the adapters in training."""
    stack.load(label, layers, modules={key: each[0] for key, each in full_weights(layers).items()})
