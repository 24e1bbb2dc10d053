"""PEFT adapter folders, read and written. The only module that knows PEFT's key names and its scaling."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from seedlora.atomic import atomic_folder
from seedlora.factors import LoRAFactors

if TYPE_CHECKING:
    from peft import LoraConfig

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


class AdapterError(ValueError):
    """An adapter folder that cannot be read, or holds what cannot be fused. The message names file, key and value."""


@dataclass(frozen=True)
class Adapter:
    """One adapter as read from disk: its update per layer, and the base model it belongs to.

    Args:
        layers: layer path within the base model (``model.layers.0.self_attn.q_proj``) to one adapter (``N = 1``),
            scaling folded into ``B``.
        base_model: ``base_model_name_or_path`` of its configuration.
    """

    layers: dict[str, LoRAFactors]
    base_model: str


def read_adapter(path: str | Path) -> Adapter:
    """Read a PEFT LoRA folder and fold its scaling into ``B``.

    The scaling is ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with rsLoRA, where a layer's rank is that of its
    tensors and its alpha may come from ``alpha_pattern``.

    Raises:
        AdapterError: if a file is missing or broken, a value is not finite, a factor lacks its partner, or the adapter
            is not plain LoRA on linear layers.
    """
    from peft.utils.other import get_pattern_key

    path = Path(path)
    config = _read_config(path)
    tensors = _read_tensors(path / WEIGHTS_NAME)
    layers = {}
    for key in sorted(tensors):
        if not key.startswith(_PREFIX) or not key.endswith((_A, _B)):
            raise AdapterError(f"{path / WEIGHTS_NAME}: '{key}' is no factor of plain LoRA on a linear layer")
        name = key.removeprefix(_PREFIX).removesuffix(_A).removesuffix(_B)
        if key.endswith(_B):
            if _PREFIX + name + _A not in tensors:
                raise AdapterError(f"{path / WEIGHTS_NAME}: '{key}' has no {_A} beside it")
            continue
        if (b := tensors.get(_PREFIX + name + _B)) is None:
            raise AdapterError(f"{path / WEIGHTS_NAME}: '{key}' has no {_B} beside it")
        a = tensors[key]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise AdapterError(f"{path / WEIGHTS_NAME}: '{key}' has shape {tuple(a.shape)}, its B {tuple(b.shape)}")
        rank = a.shape[0]
        alpha = config.get("alpha_pattern", {})
        scaling = alpha.get(get_pattern_key(alpha.keys(), name), config["lora_alpha"])
        scaling /= math.sqrt(rank) if config.get("use_rslora") else rank
        b = (b.to(torch.promote_types(b.dtype, torch.float32)) * scaling).to(b.dtype)
        layers[name] = LoRAFactors(a[None], b[None])
    if not layers:
        raise AdapterError(f"{path / WEIGHTS_NAME} holds no LoRA factors")
    return Adapter(layers, config.get("base_model_name_or_path") or "")


def write_adapter(
    path: str | Path,
    layers: Mapping[str, LoRAFactors],
    config: LoraConfig,
    *,
    files: Mapping[str, str] | None = None,
) -> None:
    """Write a PEFT folder, whole or not at all.

    Args:
        path: the folder; an older one is replaced.
        layers: one adapter (``N = 1``) per layer path, stored as it is: ``B`` without the scaling that ``config`` says.
        config: PEFT's configuration of it.
        files: further text files of the folder, by name: a model card, for example.

    Raises:
        AdapterError: if a factor is empty or not finite; nothing is written then.
        OSError: if it cannot be written; an older folder is then untouched.
    """
    tensors = {}
    for name, factors in layers.items():
        for suffix, tensor in ((_A, factors.A), (_B, factors.B)):
            if tensor.shape[0] != 1 or not tensor.numel() or not bool(tensor.isfinite().all()):
                raise AdapterError(
                    f"not writing {path}: {name}{suffix} of shape {tuple(tensor.shape)} is empty, stacked or not finite"
                )
            tensors[_PREFIX + name + suffix] = tensor[0].detach().cpu().contiguous()
    with atomic_folder(Path(path)) as folder:
        save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        (folder / CONFIG_NAME).write_text(json.dumps(_json_config(config), indent=2, sort_keys=True) + "\n")
        for name, text in (files or {}).items():
            (folder / name).write_text(text, encoding="utf-8")


def universal_config(layers: Mapping[str, LoRAFactors], *, base_model: str) -> LoraConfig:
    """The configuration that every server loads: one rank R for all layers, ``lora_alpha = R``, nothing optional.

    Raises:
        AdapterError: if the layers differ in rank.
    """
    from peft import LoraConfig

    ranks = sorted({factors.rank for factors in layers.values()})
    if len(ranks) != 1:
        raise AdapterError(f"servers need one rank for all layers, got {ranks or 'no layer'}")
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        r=ranks[0],
        lora_alpha=ranks[0],
        target_modules=sorted({name.rpartition(".")[2] for name in layers}),
        inference_mode=True,
    )


def _json_config(config: LoraConfig) -> dict[str, Any]:
    entries = config.to_dict()
    entries["inference_mode"] = True
    return {key: sorted(value) if isinstance(value, set) else value for key, value in entries.items()}


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG_NAME
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{path} is no PEFT adapter folder: it has no {CONFIG_NAME}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, OSError) as error:
        raise AdapterError(f"{file} cannot be read: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise AdapterError(f"{file}: peft_type is {kind!r}, only 'LORA' can be read")
    if not isinstance(config.get("lora_alpha"), int | float):
        raise AdapterError(f"{file}: lora_alpha is {config.get('lora_alpha')!r}, a number is needed")
    refused = {"use_dora": "DoRA", "lora_bias": "lora_bias", "fan_in_fan_out": "fan_in_fan_out"}
    for key, name in refused.items():
        if config.get(key):
            raise AdapterError(f"{file}: {name} is not plain LoRA; its update cannot be read from the factors alone")
    if isinstance(init := config.get("init_lora_weights"), str) and init.split("_")[0] not in {"gaussian", "eva"}:
        raise AdapterError(f"{file}: init_lora_weights is {init!r}, which may change the base weights; not plain LoRA")
    return config


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    if not file.is_file():
        raise AdapterError(f"{file} is missing; pickled weights (.bin) are not read")
    try:
        with safe_open(file, framework="pt") as handle:
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file} is not a whole safetensors file: {error}") from None
    for key, tensor in tensors.items():
        if not tensor.numel():
            raise AdapterError(f"{file}: '{key}' is empty, shape {tuple(tensor.shape)}")
        if not bool(tensor.isfinite().all()):
            raise AdapterError(f"{file}: '{key}' holds NaN or infinity")
    return tensors
