"""Compare adapters of one base model: how alike they are, layer by layer, and what a rule would make of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from seedlora.adapters.adapter import Adapter
from seedlora.merge.bound_rule import MergeRule
from seedlora.merge.inputs import read_adapters, stack_updates, weight_files_of
from seedlora.merge.layers import merge_stacks
from seedlora.merge.registry import make_rule
from seedlora.updates.compression import compress_each
from seedlora.updates.diagnostics import LayerFacts, layer_facts, model_cosines, natural_sort_key
from seedlora.updates.factors import LoRAFactors

#: The rank at which updates of full rank are shown.
SHOWN_RANK = 64


@dataclass(frozen=True)
class AdapterComparison:
    """Tell how alike adapters are.

    Attributes:
        adapters: by the names under which they were given.
        stacks: their updates by layer path; those of full rank at their best approximation of :data:`SHOWN_RANK`.
        layers: facts about each layer, in the order of the model.
        cosines: of all pairs, over the whole model.
        merged: the update that the rule makes of each layer; ``None`` if no rule was given.
        rank_error: the largest relative error of an update that was approximated; ``None`` if none was.
    """

    adapters: Mapping[str, Adapter]
    stacks: Mapping[str, LoRAFactors]
    layers: Sequence[LayerFacts]
    cosines: list[list[float]]
    merged: Mapping[str, LoRAFactors] | None
    rank_error: float | None


def compare(
    sources: Sequence[str | Path],
    *,
    method: str | MergeRule | None = "seedlora",
    base: str | Path | None = None,
    on_layer: Callable[[str], object] = lambda _path: None,
) -> AdapterComparison:
    """Compare adapter folders.

    Args:
        sources: adapter folders or hub ids, of one base model.
        method: the merge that is shown beside them; ``None`` for none.
        base: the base model, for DoRA, PiSSA and OLoRA. Default: the one that the adapters name.
        on_layer: called with each layer's path when it is described, and when PiSSA's start of it was computed.

    Raises:
        ValueError: for an unknown method; ``AdapterError`` for adapters that cannot be read or do not belong together.

    Example:
        >>> import torch
        >>> from peft import LoraConfig
        >>> from seedlora import LoRAFactors, write_adapter
        >>> for seed in (1, 2):
        ...     factors = LoRAFactors(A=torch.eye(2, 8).unsqueeze(0), B=torch.ones(1, 6, 2) / seed)
        ...     config = LoraConfig(r=2, lora_alpha=2, target_modules=["up_proj"])
        ...     write_adapter(f"seed_{seed}", {"model.layers.0.mlp.up_proj": factors}, config)
        >>> compare(["seed_1", "seed_2"], method="soup").cosines[0][1]  # one is half of the other
        1.0
    """
    rule = None if method is None else make_rule(method)
    weights = weight_files_of(sources, base)
    adapters = read_adapters(sources, base=weights, on_layer=on_layer)
    stacks, worst = dict[str, LoRAFactors](), None
    for path, stack in stack_updates(adapters, weights).items():
        if isinstance(stack, LoRAFactors):
            stacks[path] = stack
            continue
        stacks[path], error = compress_each(stack, min(SHOWN_RANK, *stack.shape))
        worst = max(error, worst or 0.0)
    merged = None if rule is None else merge_stacks(stacks, rule)
    layers = []
    for path in sorted(stacks, key=natural_sort_key):
        layers.append(layer_facts(path, stacks[path], merged=None if merged is None else merged[path]))
        on_layer(path)
    return AdapterComparison(adapters, stacks, layers, model_cosines(stacks).tolist(), merged, worst)
