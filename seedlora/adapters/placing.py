"""Place an adapter on its base model: each layer under the model's own name, laid out as the model stores it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias, TypeVar

from safetensors import SafetensorError

from seedlora.adapters.adapter import Adapter, AdapterError
from seedlora.model.base_layers import BaseLayers, base_layers
from seedlora.model.weight_files import WeightFiles

_Value = TypeVar("_Value")
#: Shapes of weights as they are stored, by layer path.
_Shapes: TypeAlias = Mapping[str, tuple[int, ...]]


def placed_on(adapter: Adapter, file: Path, base: WeightFiles) -> Adapter:
    """Return an adapter with its layers under the base model's own names, and with how the base stores each.

    PEFT finds a layer by its name alone, and says nothing of one that it does not find: an adapter under other names
    would change nothing. ``fan_in_fan_out`` of a configuration is that of the layer which PEFT wrapped last.

    Args:
        adapter: as it was read.
        file: of its weights, for messages.
        base: its base model; where it is not on this machine, or its class is not known, the adapter comes back as it
            is.

    Raises:
        AdapterError: if the base model has no such layer, or has it in another shape.
    """
    if not str(base.source):
        return adapter
    known = base_layers(base.source, adapter.task_type)
    is_whole = known is not None and all(known.modules.find(path) in known.shapes for path in adapter.layers)
    stored = {} if is_whole else _stored_shapes(adapter, base)
    names = {path: path for path in adapter.layers}
    if known is not None:
        names = _names_on(adapter, file, known, stored, base)
        _check_shapes(adapter, file, names, known, base)

    transposed = [name for path, name in names.items() if _is_transposed(adapter, path, name, known, stored)]

    def renamed(values: Mapping[str, _Value]) -> dict[str, _Value]:
        return {names.get(path, path): value for path, value in values.items()}

    return replace(
        adapter,
        layers=renamed(adapter.layers),
        embeddings=frozenset(names[path] for path in adapter.embeddings),
        transposed=frozenset(transposed),
        copies=renamed(adapter.copies),
        magnitudes=renamed(adapter.magnitudes),
        biases=renamed(adapter.biases),
        modules={_module_key(key, known): tensor for key, tensor in adapter.modules.items()},
        start=None if adapter.start is None else replace(adapter.start, scalings=renamed(adapter.start.scalings)),
        renamed=adapter.renamed or any(path != name for path, name in names.items()),
    )


def _names_on(adapter: Adapter, file: Path, known: BaseLayers, stored: _Shapes, base: WeightFiles) -> dict[str, str]:
    """Return the base model's name of each layer, by the adapter's.

    It is the adapter's own, if the checkpoint has it where the class does not: transformers stores the experts of a
    mixture apart and loads them as one.
    """
    names, missing = dict[str, str](), list[str]()
    for path in adapter.layers:
        if (name := known.modules.find(path)) in known.shapes:
            names[path] = str(name)
        elif path in stored:
            names[path] = path
        else:
            missing.append(path)
    if missing:
        like = next((path for path in known.shapes if path.split(".")[-1] == missing[0].split(".")[-1]), None)
        has = f"has {like}" if like is not None else "has no layer of that kind"
        raise AdapterError(
            f"{file}: '{missing[0]}' ({len(missing)} of {len(adapter.layers)} layers) is no layer of the base model "
            f"{base.source}, which {has}: the adapter would change nothing there; name the base model that it was "
            "trained on as base_model_name_or_path, or by --base"
        )
    given = dict[str, str]()
    for path, name in names.items():
        if (other := given.setdefault(name, path)) != path:
            raise AdapterError(f"{file}: '{other}' and '{path}' both mean {name} of the base model {base.source}")
    return names


def _is_transposed(adapter: Adapter, path: str, name: str, known: BaseLayers | None, stored: _Shapes) -> bool:
    """Return whether the base stores a layer's weight as ``(K, D)``: as its class does, or else as its shape says, or
    where that says nothing either as the configuration has it.
    """
    if path in adapter.embeddings:
        return False
    if known is not None and name in known.shapes:
        return name in known.transposed
    shape, found = adapter.layers[path].shape, stored.get(path)
    if shape == shape[::-1] or found not in (shape, shape[::-1]):
        return path in adapter.transposed
    return found != shape


def _stored_shapes(adapter: Adapter, base: WeightFiles) -> dict[str, tuple[int, ...]]:
    """Return the shapes that the layers' weights have in the base model's files; none if they cannot be read here."""
    files = WeightFiles(base.source, cached=True)
    try:
        return {path: files.shape(key) for path in adapter.layers if (key := f"{path}.weight") in files.files}
    except (ValueError, OSError, SafetensorError):
        return {}


def _module_key(key: str, known: BaseLayers | None) -> str:
    """Return the key of a full weight under the base model's own name of its module."""
    path, dot, parameter = key.rpartition(".")
    return ((None if known is None else known.modules.find(path)) or path) + dot + parameter


def _check_shapes(adapter: Adapter, file: Path, names: Mapping[str, str], known: BaseLayers, base: WeightFiles) -> None:
    """Check the shapes of layers; those that PEFT copied may be of a resized vocabulary, which is another question."""
    for path, name in names.items():
        shape = known.shapes.get(name)
        if shape is not None and path not in adapter.copies and shape != adapter.layers[path].shape:
            raise AdapterError(
                f"{file}: the update of '{path}' is {adapter.layers[path].shape}, and the layer {name} of the base "
                f"model {base.source} is {shape}; it is not the base model of this adapter"
            )
