"""Adapters in, one adapter out: the merge rule applied layer by layer, and the folder that servers load."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from seedlora.adapter import WEIGHTS_NAME, Adapter, AdapterError, read_adapter, universal_config, write_adapter
from seedlora.factors import LoRAFactors
from seedlora.merge import MergeRule, bind

RECORD_NAME = "fusion.json"


def fuse(stacks: Mapping[str, LoRAFactors], rule: MergeRule) -> dict[str, LoRAFactors]:
    """Apply a merge rule to the stack of every layer; ranks are padded with zeros to the largest, as servers need."""
    fused = {path: rule(stack) for path, stack in stacks.items()}
    rank = max((factors.rank for factors in fused.values()), default=0)
    return {path: _padded(factors, rank) for path, factors in fused.items()}


def stack_adapters(adapters: Mapping[str, Adapter]) -> dict[str, LoRAFactors]:
    """Stack adapters layer by layer, after checking that they belong together.

    Args:
        adapters: by name, for the messages.

    Raises:
        AdapterError: if there is none, or two of them differ in base model, layers or shapes; the message names both.
    """
    if not adapters:
        raise AdapterError("no adapter was given; fusing needs at least one")
    (first_name, first), *others = adapters.items()
    for name, adapter in others:
        if adapter.base_model != first.base_model:
            raise AdapterError(
                f"{first_name} belongs to base model '{first.base_model}', {name} to '{adapter.base_model}'"
            )
        if odd := sorted(set(adapter.layers) ^ set(first.layers)):
            holder = name if odd[0] in adapter.layers else first_name
            raise AdapterError(f"{first_name} and {name} adapt different layers: only {holder} has {odd[0]}")
        for path, factors in adapter.layers.items():
            if factors.shape != first.layers[path].shape:
                raise AdapterError(
                    f"{path} has shape {first.layers[path].shape} in {first_name} and {factors.shape} in {name}"
                )
    return {path: LoRAFactors.stack([a.layers[path] for a in adapters.values()]) for path in first.layers}


def fuse_folders(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    method: str | MergeRule = "seedlora",
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Fuse PEFT adapter folders into one that PEFT, vLLM, SGLang and others load.

    The result has one rank R and ``lora_alpha = R``, all scaling folded into ``B``. ``fusion.json`` in it says how it
    was made: method, options, and the sha256 of every input.

    Args:
        sources: adapter folders of one base model.
        out: the folder to write, whole or not at all; an older one is replaced.
        method: a name of :data:`seedlora.merge.METHODS`, or any rule.
        options: the method's keyword options.

    Raises:
        ValueError: for an unknown method or option; ``AdapterError`` for adapters that cannot be read or fused.
    """
    rule = bind(method, options)
    paths = [Path(source) for source in sources]
    adapters = {str(path): read_adapter(path) for path in paths}
    fused = fuse(stack_adapters(adapters), rule)
    base_model = next(iter(adapters.values())).base_model
    record = {
        "method": method if isinstance(method, str) else getattr(method, "__name__", repr(method)),
        "options": dict(options or {}),
        "inputs": [{"name": path.name, "sha256": _sha256(path / WEIGHTS_NAME)} for path in paths],
        "base_model": base_model,
        "seedlora": version("seedlora"),
    }
    files = {RECORD_NAME: json.dumps(record, indent=2, default=str) + "\n", "README.md": _card(record, fused)}
    write_adapter(out, fused, universal_config(fused, base_model=base_model), files=files)
    return Path(out)


def _padded(factors: LoRAFactors, rank: int) -> LoRAFactors:
    extra = rank - factors.rank
    pad = torch.nn.functional.pad
    return LoRAFactors(pad(factors.A, (0, 0, 0, extra)), pad(factors.B, (0, extra))) if extra else factors


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _card(record: Mapping[str, Any], fused: Mapping[str, LoRAFactors]) -> str:
    rank = next(iter(fused.values())).rank
    return f"""---
base_model: {record["base_model"]}
library_name: peft
tags: [lora, seedlora]
---
# {len(record["inputs"])} LoRA adapters fused with `{record["method"]}`

Rank {rank}, `lora_alpha` {rank}: all scaling is in the weights. `{RECORD_NAME}` lists method, options and inputs.
"""
