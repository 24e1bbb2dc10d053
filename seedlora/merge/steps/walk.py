"""Types of the walk over all layers that rules which depend on the whole model are given."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

from seedlora.updates.dense import Updates
from seedlora.updates.factors import LoRAFactors

#: Gives path and stack of every layer that a rule is applied to, from the start at each call. Only
#: :func:`seedlora.merge.layers.merge_stacks` makes one over a model, so layers are walked in one place.
Walk: TypeAlias = Callable[[], Iterable[tuple[str, LoRAFactors]]]
#: The same for a rule that takes updates of full rank as well.
AnyWalk: TypeAlias = Callable[[], Iterable[tuple[str, Updates]]]
