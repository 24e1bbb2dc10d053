"""Read PEFT adapter folders; with :mod:`~seedlora.adapters.writing` and the key names of
:mod:`~seedlora.adapters.adapter` all that knows PEFT's format.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from seedlora.adapters.adapter import (
    CONFIG_NAME,
    KEY_A,
    KEY_B,
    KEY_BASE_COPY,
    KEY_BIAS,
    KEY_EMBEDDING_A,
    KEY_EMBEDDING_B,
    KEY_MAGNITUDE,
    KEY_PREFIX,
    WEIGHTS_NAME,
    Adapter,
    AdapterError,
    StartRecord,
    is_finite,
    locate,
    quantization_of,
)
from seedlora.adapters.base_copies import check_copies, rows_and_sha256
from seedlora.adapters.config_keys import REPEATED_INITS
from seedlora.adapters.key_names import plain_keys
from seedlora.adapters.original_base import base_key_of, without_start
from seedlora.adapters.peft_config import AdapterConfig, read_config
from seedlora.adapters.placing import placed_on
from seedlora.adapters.targets import check_targeted
from seedlora.model.weight_files import WeightFiles, broken_weights
from seedlora.updates.factors import LoRAFactors

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: The suffix of the other factor of a layer.
_PARTNERS = {KEY_A: KEY_B, KEY_B: KEY_A, KEY_EMBEDDING_A: KEY_EMBEDDING_B, KEY_EMBEDDING_B: KEY_EMBEDDING_A}


def base_model_of(source: str | Path) -> str:
    """Return the base model that an adapter folder or hub id names, or an empty text.

    Raises:
        AdapterError: if its configuration cannot be read.
    """
    return read_config(locate(source), allow_more=True).base_model


def read_adapter(
    path: str | Path,
    *,
    base: WeightFiles | None = None,
    keep_start: bool = False,
    on_layer: Callable[[str], object] | None = None,
) -> Adapter:
    """Read a PEFT LoRA folder and fold its scaling into ``B``.

    The scaling is ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with rsLoRA; a layer's rank and alpha may come from
    ``rank_pattern`` and ``alpha_pattern``. Factors that it would round are brought to float32 first.

    Names of wrappers within keys are taken out, and where the base model is on this machine each layer gets the name
    that it has there.

    PiSSA and OLoRA take their start out of the base weights. Saved without conversion, their factors belong to the
    changed weights; the start is then computed again and subtracted by :func:`without_start`.

    Args:
        path: the folder.
        base: the base model, opened if it is needed. With it, adapters are read whose updates are more than factors:
            DoRA, PiSSA, OLoRA, ``lora_bias``, ``modules_to_save``. Without it these are refused, so that who only looks
            at ``layers`` misses nothing.
        keep_start: leave a start of PiSSA or OLoRA where it is, for :func:`without_start`.
        on_layer: called with the path of each layer whose start was computed again.

    Raises:
        AdapterError: if a file is missing or broken, a value is not finite, a factor lacks its partner, a rank is not
            what the configuration says, the base model is needed and cannot be read, or the adapter is of a kind that
            cannot be merged. Nothing else comes out.

    Example:
        >>> from peft import LoraConfig
        >>> from seedlora import write_adapter
        >>> layers = {"model.layers.0.mlp.up_proj": LoRAFactors(A=torch.ones(1, 2, 8), B=torch.ones(1, 6, 2))}
        >>> write_adapter("adapter", layers, LoraConfig(r=2, lora_alpha=4, target_modules=["up_proj"]))
        >>> factors = read_adapter("adapter").layers["model.layers.0.mlp.up_proj"]
        >>> factors.shape, factors.B.unique()  # multiplied by lora_alpha / r
        ((6, 8), tensor([2.]))
    """
    path = Path(path)
    config = read_config(path, allow_more=base is not None)
    file = path / WEIGHTS_NAME
    stored = _read_tensors(file)
    names = plain_keys(stored, file)
    tensors = {names[key]: tensor for key, tensor in stored.items()}
    copies = _pop_by_suffix(tensors, KEY_BASE_COPY)
    modules = _pop_modules_to_save(tensors, config)
    magnitudes = _pop_by_suffix(tensors, KEY_MAGNITUDE) if config.use_dora else {}
    biases = _pop_by_suffix(tensors, KEY_BIAS) if config.lora_bias else {}
    layers, embeddings, scalings, dtypes = {}, set(), {}, set()
    for pair in _pair_factors(file, tensors):
        check_targeted(file, pair.path, config.targets)
        scalings[pair.path] = scaling = config.scaling(path, pair.path, pair.a.shape[0])
        layers[pair.path] = _fold_scaling(file, pair, scaling, has_start=config.init in REPEATED_INITS)
        dtypes.add(pair.b.dtype)
        if pair.path in biases:
            biases[pair.path] = _scaled(biases[pair.path], scaling)
        if pair.is_embedding:
            embeddings.add(pair.path)
    if not layers:
        raise AdapterError(f"{file} holds no LoRA factors")
    adapter = Adapter(
        layers,
        config.base_model,
        embeddings=frozenset(embeddings),
        transposed=frozenset(layers) - embeddings if config.fan_in_fan_out else frozenset(),
        copies={name: rows_and_sha256(copy) for name, copy in copies.items()},
        magnitudes=magnitudes,
        biases=biases,
        modules=modules,
        modules_to_save=tuple(sorted(config.modules_to_save)) if modules else (),
        kinds=config.kinds,
        task_type=config.task_type,
        auto_mapping=config.auto_mapping,
        start=StartRecord(file, config.init, scalings) if config.init in REPEATED_INITS else None,
        quantization=quantization_of(path),
        revision=config.revision,
        stored_dtype=None if config.init in REPEATED_INITS else reduce(torch.promote_types, dtypes),
        renamed=any(key != name for key, name in names.items()),
    )
    _check_vectors(file, adapter, config)
    if base is not None:
        adapter = placed_on(adapter, file, base)
        if adapter.start is None:  # a start at the weights takes its part of them away
            check_copies(copies, file, base)
    if base is not None and config.use_dora:
        for name in adapter.layers:
            base_key_of(file, adapter, name, base)
    return adapter if base is None or keep_start else without_start(adapter, base, on_layer=on_layer)


class _FactorPair(NamedTuple):
    """The factors of one layer as they are stored: ``a`` (r, K) and ``b`` (D, r), without the scaling."""

    path: str
    a: Tensor
    b: Tensor
    is_embedding: bool


def _pair_factors(file: Path, tensors: Mapping[str, Tensor]) -> Iterator[_FactorPair]:
    """Give the factors of each layer, in the order of the keys, after checking that they belong together."""
    paths = set()
    for key in sorted(tensors):
        suffix = next((s for s in _PARTNERS if key.endswith(s)), None)
        if suffix is None or not key.startswith(KEY_PREFIX) or len(key) <= len(KEY_PREFIX) + len(suffix):
            raise AdapterError(
                f"{file}: '{key}' is no factor of plain LoRA on a linear or embedding layer{_advice(key)}"
            )
        path = key.removeprefix(KEY_PREFIX).removesuffix(suffix)
        if (b := tensors.get(KEY_PREFIX + path + _PARTNERS[suffix])) is None:
            raise AdapterError(f"{file}: '{key}' has no {_PARTNERS[suffix]} beside it")
        if suffix in (KEY_B, KEY_EMBEDDING_B):
            continue
        if path in paths:
            raise AdapterError(f"{file}: '{path}' has factors of a linear layer and of an embedding")
        a = tensors[key]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise AdapterError(
                f"{file}: '{key}' has shape {tuple(a.shape)} and its B {tuple(b.shape)}; (r, K) and (D, r) are needed"
            )
        paths.add(path)
        yield _FactorPair(path, a, b, suffix == KEY_EMBEDDING_A)


def _fold_scaling(file: Path, pair: _FactorPair, scaling: float, *, has_start: bool) -> LoRAFactors:
    """Return the factors of a layer with the scaling in ``B``, both in float32 or higher unless nothing is rounded.

    Args:
        file: for messages.
        pair: as stored.
        scaling: what ``B`` is multiplied by; a power of two rounds no number.
        has_start: most of the factors is their start at the base weights, of which rounding must leave nothing.
    """
    a, b = pair.a, pair.b
    if has_start or not _is_power_of_two(scaling):
        a, b = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (a, b))
    b = _scaled(b, scaling)
    if b is not pair.b and not is_finite(b):
        raise AdapterError(f"{file}: '{pair.path}' overflows {b.dtype} when its scaling is applied")
    return LoRAFactors(a[None], b[None])


def _is_power_of_two(scaling: float) -> bool:
    return math.frexp(scaling)[0] == 0.5


def _advice(key: str) -> str:
    """Return what a key of another form probably is, and what to do; the end of a sentence."""
    if "lora" in key:
        own = f"PEFT's own keys begin with {KEY_PREFIX} and end in {KEY_A} or {KEY_B}"
        return f"; {own}: save it with PEFT's save_pretrained"
    if key.startswith(KEY_PREFIX) and key.endswith(".weight"):
        name = key.split(".")[-2]
        return f" but a full weight, as PEFT saves it of a resized vocabulary; add '{name}' to modules_to_save in " + (
            f"{CONFIG_NAME}, and python -m seedlora merge averages it"
        )
    return ""


def _pop_by_suffix(tensors: dict[str, Tensor], suffix: str) -> dict[str, Tensor]:
    """Take the tensors of one suffix out of the others, and return them by layer path."""
    keys = [key for key in tensors if key.startswith(KEY_PREFIX) and key.endswith(suffix)]
    return {key.removeprefix(KEY_PREFIX).removesuffix(suffix): tensors.pop(key) for key in keys}


def _pop_modules_to_save(tensors: dict[str, Tensor], config: AdapterConfig) -> dict[str, Tensor]:
    """Take the full weights of ``modules_to_save`` out of the others, and return them by key within the model.

    As PEFT has it, a name is the end of a path, in the midst of a part too: ``norm`` means every ``input_layernorm``.
    """
    names = [re.escape(name) for name in config.modules_to_save]
    pattern = re.compile(rf"{re.escape(KEY_PREFIX)}.*(?:{'|'.join(names)})\.")
    keys = [key for key in tensors if names and "lora_" not in key and pattern.match(key)]
    return {key.removeprefix(KEY_PREFIX): tensors.pop(key) for key in keys}


def _check_vectors(file: Path, adapter: Adapter, config: AdapterConfig) -> None:
    """Check that every layer has one magnitude and one bias per output feature, where the configuration says so."""
    wanted = {}
    if config.use_dora:
        wanted["use_dora"] = adapter.magnitudes, KEY_MAGNITUDE
    if config.lora_bias:
        wanted["lora_bias"] = adapter.biases, KEY_BIAS
    for key, (vectors, suffix) in wanted.items():
        for name, factors in adapter.layers.items():
            if suffix == KEY_BIAS and name in adapter.embeddings:
                continue
            if name not in vectors:
                raise AdapterError(f"{file}: {key} is set, but '{name}' has no {suffix}")
            if vectors[name].shape != factors.shape[:1]:
                raise AdapterError(
                    f"{file}: '{name}{suffix}' has shape {tuple(vectors[name].shape)}, {factors.shape[:1]} is needed"
                )
        if odd := sorted(set(vectors) - set(adapter.layers)):
            raise AdapterError(f"{file}: '{odd[0]}' has {suffix} but no factors")


def _scaled(b: torch.Tensor, scaling: float) -> torch.Tensor:
    if scaling == 1:
        return b
    compute = torch.promote_types(b.dtype, torch.float32)
    product = b.to(compute) * scaling
    return product.to(b.dtype) if _is_power_of_two(scaling) else product


def _read_tensors(file: Path) -> dict[str, Tensor]:
    """Read the tensors of the file by key."""
    if not file.is_file():
        found = sorted(other.name for other in file.parent.glob("adapter_model*"))
        there = f"; there is {', '.join(found)}: load it with PEFT and save_pretrained" if found else ""
        raise AdapterError(f"{file} is missing; pickled weights (.bin) and parts of weights are not read{there}")
    try:
        with safe_open(file, framework="pt") as handle:
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(broken_weights(file, error)) from None
    for key, tensor in tensors.items():
        if not tensor.numel():
            raise AdapterError(f"{file}: '{key}' is empty, shape {tuple(tensor.shape)}")
        if tensor.dtype not in _FLOATS:
            raise AdapterError(f"{file}: '{key}' is {tensor.dtype}; factors are {', '.join(map(str, _FLOATS))}")
        if not is_finite(tensor):
            raise AdapterError(f"{file}: '{key}' holds NaN or infinity")
    return tensors
