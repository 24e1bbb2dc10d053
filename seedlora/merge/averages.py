"""Average what a merge rule is not applied to: full weights and biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from seedlora.adapters.adapter import Adapter, AdapterError
from seedlora.merge.bound_rule import BoundRule


class Averages(NamedTuple):
    """Averaged biases by layer path, and averaged full weights by key within the model."""

    biases: dict[str, Tensor]
    modules: dict[str, Tensor]

    @property
    def change_anything(self) -> bool:
        """Return whether there are full weights, or biases that are not zero."""
        return bool(self.modules) or any(bool(bias.any()) for bias in self.biases.values())


def average_biases_and_modules(adapters: Mapping[str, Adapter], bound: BoundRule, *, rounded: bool = True) -> Averages:
    """Average the adapters' biases and full weights, whatever the rule: they have no factors to apply it to.

    With the rule's ``weights``, biases are summed as it sums updates (``w_n / N``).

    Args:
        adapters: by name.
        bound: the rule.
        rounded: whether the averages are rounded to the finest dtype of the inputs; else they are in float32 or higher.

    Raises:
        AdapterError: as :func:`average_modules`.
    """
    members = list(adapters.values())
    biases = {path: [m.biases[path] for m in members] for path in members[0].biases}
    modules = {key: [m.modules[key] for m in members] for key in members[0].modules}
    w = _adapter_weights(bound, len(members), "lora_bias") / len(members) if biases else torch.empty(0)
    return Averages(
        {path: _weighted_sum(each, w, rounded=rounded) for path, each in biases.items()},
        average_modules(modules, bound, rounded=rounded),
    )


def average_modules(
    modules: Mapping[str, Sequence[Tensor]], bound: BoundRule, *, rounded: bool = True
) -> dict[str, Tensor]:
    """Average full weights by key: with the rule's weights, brought to a sum of 1, or over its chosen members alone.

    Args:
        modules: of all adapters, by key.
        bound: the rule.
        rounded: as for :func:`average_biases_and_modules`.

    Raises:
        AdapterError: if the rule's weights add up to 0 or less, or are not as many as the adapters, or the rule chooses
            among the adapters by a score: what is averaged would be of all.
    """
    if not modules:
        return {}
    w = _adapter_weights(bound, len(next(iter(modules.values()))), min(modules))
    if not w.sum() > 0:
        raise AdapterError(f"modules_to_save are averaged, so weights must add up to more than 0, got {w.tolist()}")
    return {key: _weighted_sum(each, w / w.sum(), rounded=rounded) for key, each in modules.items()}


def _adapter_weights(bound: BoundRule, n: int, what: str) -> Tensor:
    """Return the rule's weight of each adapter, 1 unless it says otherwise; ``what`` names the averaged thing in
    errors.
    """
    if bound.name == "greedy_soup" and n > 1:
        if "members" not in bound.options:
            raise AdapterError(f"greedy_soup chooses among adapters, and {what} would be the mean of all; take soup")
        w, chosen = torch.zeros(n, dtype=torch.float64), list(bound.options["members"])
        w[chosen] = n / len(chosen)
        return w
    given = bound.options.get("weights")
    w = torch.as_tensor([1.0] * n if given is None else given, dtype=torch.float64)
    if len(w) != n:
        raise AdapterError(f"weights must be {n} numbers, one per adapter, got {w.tolist()}")
    return w


def _weighted_sum(tensors: Sequence[Tensor], weights: Tensor, *, rounded: bool) -> Tensor:
    finest = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    compute = torch.promote_types(finest, torch.float32)
    total = sum(float(x) * t.to(compute) for x, t in zip(weights, tensors, strict=True))
    assert isinstance(total, Tensor)
    return total.to(finest) if rounded else total
