"""Score adapters on rows."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor

#: Adapters that are scored in one forward.
ADAPTERS_PER_FORWARD = 8


def real_items(items: Tensor) -> Int[Tensor, " I"]:
    """Where the items are, in their order; those that fill up the shares of the ranks have negative numbers."""
    order = items.argsort()
    return order[items[order] >= 0]
