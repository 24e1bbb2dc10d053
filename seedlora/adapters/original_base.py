"""Turn an adapter that starts at factors of the base weights into one for the original base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from seedlora.adapters.adapter import Adapter, AdapterError, StartRecord
from seedlora.model.weight_files import WeightFiles
from seedlora.updates.factors import LoRAFactors


def without_start(adapter: Adapter, base: WeightFiles, *, on_layer: Callable[[str], object] | None = None) -> Adapter:
    """Return the adapter relative to the original base weights, if PiSSA or OLoRA took its start out of them.

    The start is computed again by PEFT's own code, and the factors become ``[B, -B_0] [A; A_0]``, of twice the rank, in
    float32 or higher: rounded to the adapter's dtype, the start would not be the one that was taken out. Costs one SVD
    (PiSSA) or QR (OLoRA) of every weight, once for all adapters that are given the same ``base``.

    Args:
        adapter: as :func:`read_adapter` gives it.
        base: its base model.
        on_layer: called with the path of each layer when it is done.

    Raises:
        AdapterError: if the base model cannot be read, or is another.
    """
    if adapter.start is None:
        return adapter
    layers = {}
    for name in adapter.layers:
        layers[name] = _subtract_start(adapter, adapter.start, name, base)
        if on_layer is not None:
            on_layer(name)
    return replace(adapter, layers=layers, start=None)


def base_key_of(file: Path, adapter: Adapter, name: str, base: WeightFiles) -> str:
    """Return the key of a layer's base weight, after checking that it is there and has the shape of the update."""
    kind = ", ".join(adapter.kinds)
    if not str(base.source):
        raise AdapterError(
            f"{file.parent} is {kind} and names no base model, whose weights are needed; give --base MODEL"
        )
    with _naming_adapter(file, kind):
        key = base.key(name)
        found = base.shape(key)
    shape = adapter.layers[name].shape
    if found != (shape[::-1] if adapter.flipped(name) else shape):
        raise AdapterError(
            f"{file.parent}: the base model {base.source} has '{key}' of shape {found}, but the adapter's update of "
            f"{name} has {shape}; it is not the base model of this adapter"
        )
    return key


@contextmanager
def _naming_adapter(file: Path, kind: str) -> Iterator[None]:
    """Name the adapter in errors inside the block, which reads base weights for it."""
    try:
        yield
    except (ValueError, OSError, SafetensorError) as error:
        raise AdapterError(
            f"{file.parent} is {kind}: its update depends on the base weights, which cannot be read: {error} "
            "(give another with --base MODEL)"
        ) from None


def _subtract_start(adapter: Adapter, start: StartRecord, name: str, base: WeightFiles) -> LoRAFactors:
    if name in adapter.embeddings:
        raise AdapterError(
            f"{start.file}: '{name}' is an embedding, for which PEFT has no init_lora_weights {start.init!r}"
        )
    factors = adapter.layers[name]
    what = base_key_of(start.file, adapter, name, base), start.init, factors.rank, start.scalings[name]
    if what not in base.initial_factors:
        with _naming_adapter(start.file, ", ".join(adapter.kinds)):
            weight = base.weight(what[0])
        base.initial_factors[what] = _initial_factors(weight, *what[1:], fan_in_fan_out=adapter.flipped(name))
    a, b = (part.to(factors.dtype) for part in base.initial_factors[what])
    return LoRAFactors(torch.cat([factors.A, a[None]], 1), torch.cat([factors.B, -b[None]], 2))


def _initial_factors(
    weight: Tensor, init: str, r: int, scaling: float, *, fan_in_fan_out: bool
) -> tuple[Tensor, Tensor]:
    """Return ``A_0`` and ``B_0``, scaling included, as PEFT's own layer makes them out of a weight."""
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    d, k = weight.shape[::-1] if fan_in_fan_out else weight.shape
    with torch.device("meta"):
        layer = Conv1D(d, k) if fan_in_fan_out else torch.nn.Linear(k, d, bias=False)
    layer.weight, layer.bias = torch.nn.Parameter(weight.clone(), requires_grad=False), None
    config = LoraConfig(
        r=r, lora_alpha=scaling * r, target_modules=["layer"], init_lora_weights=init, fan_in_fan_out=fan_in_fan_out
    )
    module = inject_adapter_in_model(config, torch.nn.ModuleDict({"layer": layer}))["layer"]
    a, b = (getattr(module, part)["default"].weight.data.float() for part in ("lora_A", "lora_B"))
    return a, b * scaling
