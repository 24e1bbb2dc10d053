"""Read adapters, check that they belong together, and stack them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch

from seedlora.adapters.adapter import BASE_NAME, Adapter, AdapterError, locate
from seedlora.adapters.original_base import without_start
from seedlora.adapters.reading import base_model_of, read_adapter
from seedlora.model.weight_files import WeightFiles
from seedlora.updates.dora import dora_updates
from seedlora.updates.factors import LoRAFactors
from seedlora.updates.stacks import Stacks


def stack_adapters(adapters: Mapping[str, Adapter], *, device: torch.device | None = None) -> Stacks[LoRAFactors]:
    """Stack the factors of adapters layer by layer, after checking that they belong together.

    Args:
        adapters: by name, for the messages.
        device: where they are to be merged. Default: where they are.

    Raises:
        AdapterError: if there is none, two of them differ in base model, layers or shapes (the message names both), or
            their updates are not their factors: see :func:`stack_updates`.
    """
    if dora := [name for name, adapter in adapters.items() if adapter.magnitudes]:
        raise AdapterError(f"{dora[0]} is DoRA, whose update is not B @ A alone; it needs the base weights")
    return _stack_factors(adapters, device)


def stack_updates(
    adapters: Mapping[str, Adapter], base: WeightFiles, *, device: torch.device | None = None
) -> Stacks[Any]:
    """Stack updates as :func:`stack_adapters` does, also DoRA's: in row blocks, as they act on the base weights.

    Args:
        adapters: by name, for the messages.
        base: their base model; read only for DoRA, and block by block when the updates are.
        device: where they are to be merged. Default: where they are.

    Raises:
        AdapterError: as :func:`stack_adapters`, and if some adapters are DoRA and others are not.
        ValueError: if the base model cannot be read or lacks a layer.
    """
    stacks = _stack_factors(adapters, device)
    members = list(adapters.values())
    if not members[0].magnitudes:
        return stacks
    dense = {
        path: dora_updates(
            stack,
            torch.stack([member.magnitudes[path] for member in members]).to(stack.device),
            base.row_reader(path, flipped=members[0].flipped(path)),
        )
        for path, stack in stacks.items()
    }
    return Stacks(dense, stacks.modules)


def check_compatible(adapters: Mapping[str, Adapter]) -> None:
    """Check that adapters belong together, before any work.

    Args:
        adapters: by name, for the messages.

    Raises:
        AdapterError: if there is none, or two of them differ in base model, task, kind, layers or shapes.
    """
    if not adapters:
        raise AdapterError("no adapter was given; merging needs at least one")
    first, *others = (_Named(name, adapter) for name, adapter in adapters.items())
    for other in others:
        _check_same_base(first, other)
        _check_same_kind(first, other)
        _check_same_modules(first, other)
        _check_same_layers(first, other)


class _Named(NamedTuple):
    """An adapter and the name that messages call it by."""

    name: str
    adapter: Adapter


def _is_same_place(a: str, b: str) -> bool:
    """Return whether two names of a base model are one, or lead to one folder: by a link, or through ``..``."""
    if not a or not b:
        return a == b
    one, other = Path(a), Path(b)
    try:
        return one == other or (one.is_dir() and other.is_dir() and one.samefile(other))
    except (OSError, ValueError):
        return False


def _check_same_base(first: _Named, other: _Named) -> None:
    (first_name, a), (name, b) = first, other
    if not _is_same_place(b.base_model, a.base_model):
        raise AdapterError(
            f"{first_name} belongs to base model '{a.base_model}', {name} to '{b.base_model}'; if these "
            "are one model, say so in adapter_config.json (base_model_name_or_path)"
        )
    if b.revision != a.revision:
        raise AdapterError(
            f"the base model's revision is {a.revision or 'main'} in {first_name} and {b.revision or 'main'} in {name}"
        )
    if b.quantization != a.quantization:
        bases = [
            "the original" if kind == "none" else f"the one in {kind} alone, as its {BASE_NAME} says"
            for kind in (a.quantization, b.quantization)
        ]
        raise AdapterError(
            f"of base model '{a.base_model}', {first_name} belongs on {bases[0]}, and {name} on {bases[1]}; merge "
            "those of one kind"
        )


def _check_same_kind(first: _Named, other: _Named) -> None:
    (first_name, a), (name, b) = first, other
    if b.task_type != a.task_type:
        raise AdapterError(f"task_type is {a.task_type} in {first_name} and {b.task_type} in {name}")
    if b.fan_in_fan_out != a.fan_in_fan_out:
        raise AdapterError(f"fan_in_fan_out is {a.fan_in_fan_out} in {first_name} and {b.fan_in_fan_out} in {name}")
    if bool(b.magnitudes) != bool(a.magnitudes):
        raise AdapterError(
            f"only {name if b.magnitudes else first_name} is DoRA, of {first_name} and {name}; make plain "
            "LoRA of it first (python -m seedlora merge, with that one alone, --method soup --rank 64)"
        )
    if bool(b.biases) != bool(a.biases):
        raise AdapterError(f"only {name if b.biases else first_name} has lora_bias, of {first_name} and {name}")


def _check_same_modules(first: _Named, other: _Named) -> None:
    (first_name, a), (name, b) = first, other
    if odd := sorted(set(b.modules) ^ set(a.modules)):
        holder = name if odd[0] in b.modules else first_name
        raise AdapterError(f"{first_name} and {name} save different modules: only {holder} has {odd[0]}")
    for key, tensor in b.modules.items():
        if tensor.shape != a.modules[key].shape:
            shapes = tuple(a.modules[key].shape), tuple(tensor.shape)
            raise AdapterError(f"{key} has shape {shapes[0]} in {first_name} and {shapes[1]} in {name}")
    for path in sorted(set(b.copies) & set(a.copies)):
        if b.copies[path] != a.copies[path]:
            raise AdapterError(
                f"{path} has different base weights in {first_name} and {name}: were vocabularies resized?"
            )


def _check_same_layers(first: _Named, other: _Named) -> None:
    (first_name, a), (name, b) = first, other
    if odd := sorted(set(b.layers) ^ set(a.layers)):
        holder = name if odd[0] in b.layers else first_name
        raise AdapterError(f"{first_name} and {name} adapt different layers: only {holder} has {odd[0]}")
    if odd := sorted(b.embeddings ^ a.embeddings):
        holder = name if odd[0] in b.embeddings else first_name
        raise AdapterError(f"{odd[0]} is an embedding only in {holder}, of {first_name} and {name}")
    for path, factors in b.layers.items():
        if factors.shape != a.layers[path].shape:
            raise AdapterError(f"{path} has shape {a.layers[path].shape} in {first_name} and {factors.shape} in {name}")


def _stack_factors(adapters: Mapping[str, Adapter], device: torch.device | None) -> Stacks[LoRAFactors]:
    check_compatible(adapters)
    members = list(adapters.values())
    return Stacks(
        {path: LoRAFactors.stack([member.layers[path].to(device) for member in members]) for path in members[0].layers},
        {key: [member.modules[key].to(device) for member in members] for key in members[0].modules},
    )


def check_vocabulary(adapter: Adapter, base: str | Path) -> None:
    """Check that the base model has the rows over which embeddings and heads were adapted.

    PEFT puts its copy of the base weights beside their factors. The fused folder has none, as servers want it: what
    the copy alone holds, the rows of a resized vocabulary, would be lost.
    """
    try:
        known = WeightFiles(base, cached=True).vocabulary_size if adapter.copies else None
    except (ValueError, OSError):
        known = None
    for path, (rows, _) in adapter.copies.items():
        if known is None:
            raise AdapterError(
                f"{path} was adapted over {rows} rows, and whether the base model '{base}' has as many is not known "
                "here; give its folder with --base MODEL"
            )
        if rows != known:
            raise AdapterError(
                f"{path} was adapted over {rows} rows, but the base model {base} has {known}: its vocabulary was "
                "resized. Save the resized base model, name it as base_model_name_or_path in adapter_config.json, and "
                "merge again"
            )


def stored_dtype(adapters: Iterable[Adapter]) -> torch.dtype | None:
    """Return the dtype in which adapters are stored, the finest of all; None if the factors are to stay as they are."""
    each = [adapter.stored_dtype for adapter in adapters]
    stored = [dtype for dtype in each if dtype is not None]
    return reduce(torch.promote_types, stored) if stored and len(stored) == len(each) else None


def read_adapters(
    sources: Sequence[str | Path],
    *,
    base: WeightFiles | None = None,
    on_layer: Callable[[str], object] | None = None,
) -> dict[str, Adapter]:
    """Read adapter folders or hub ids, by the name under which each was given.

    With a base model, starts of PiSSA and OLoRA are subtracted, after it was seen that the adapters belong together.

    Args:
        sources: folders or hub ids.
        base: their base model, for adapters that are more than factors: as in
            :func:`seedlora.adapters.reading.read_adapter`.
        on_layer: likewise.

    Raises:
        AdapterError: if one cannot be read, or is given twice; with ``base``, also as :func:`check_compatible`.
    """
    paths: dict[Path, str] = {}
    for source in sources:
        path = locate(source).resolve()
        if path in paths:
            raise AdapterError(f"{source} was given twice (also as {paths[path]}); each adapter counts once")
        paths[path] = str(source)
    found = {name: read_adapter(path, base=base, keep_start=True) for path, name in paths.items()}
    if base is None:
        return found
    check_compatible(found)
    return {name: without_start(adapter, base, on_layer=on_layer) for name, adapter in found.items()}


def weight_files_of(sources: Sequence[str | Path], base: str | Path | None = None) -> WeightFiles:
    """Return the base model that is given, or else the one that the first adapter names; opened when it is needed."""
    if base is None:
        base = base_model_of(sources[0]) if sources else ""
    return WeightFiles(base)
