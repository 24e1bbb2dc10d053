"""Write a PEFT adapter folder."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from seedlora.adapters.adapter import (
    CONFIG_NAME,
    KEY_A,
    KEY_B,
    KEY_BIAS,
    KEY_EMBEDDING_A,
    KEY_EMBEDDING_B,
    KEY_MAGNITUDE,
    KEY_PREFIX,
    WEIGHTS_NAME,
    AdapterError,
    is_finite,
)
from seedlora.adapters.config_keys import LORA_DEFAULTS
from seedlora.updates.factors import LoRAFactors
from seedlora.utils.files import atomic_folder, write_files

if TYPE_CHECKING:
    from peft import LoraConfig


def write_adapter(
    path: str | Path,
    layers: Mapping[str, LoRAFactors],
    config: LoraConfig | Mapping[str, Any],
    *,
    files: Mapping[str, str | bytes] | None = None,
    embeddings: Collection[str] = (),
    magnitudes: Mapping[str, Tensor] | None = None,
    biases: Mapping[str, Tensor] | None = None,
    modules: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a PEFT folder, whole or not at all.

    Args:
        path: the folder; an older one is replaced.
        layers: one adapter (``N = 1``) per layer path, stored as it is: ``B`` without the scaling that ``config`` says.
        config: PEFT's configuration of it, or the entries of its file.
        files: further files of the folder, by name: a model card, for example.
        embeddings: the layer paths that are embeddings.
        magnitudes: DoRA's, of shape (D,), by layer path.
        biases: what ``lora_bias`` of ``config`` adds to a layer's output, by path.
        modules: full weights of ``modules_to_save`` of ``config``, by key within the model.

    Raises:
        AdapterError: if a factor is empty or not finite; nothing is written then.
        OSError: if it cannot be written; an older folder is then untouched.

    Example:
        >>> import torch
        >>> from peft import LoraConfig
        >>> layers = {"model.layers.0.mlp.up_proj": LoRAFactors(A=torch.ones(1, 2, 8), B=torch.ones(1, 6, 2))}
        >>> write_adapter("adapter", layers, LoraConfig(r=2, lora_alpha=4, target_modules=["up_proj"]))
        >>> sorted(file.name for file in Path("adapter").iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    tensors = {}
    for name, factors in layers.items():
        suffixes = (KEY_EMBEDDING_A, KEY_EMBEDDING_B) if name in embeddings else (KEY_A, KEY_B)
        for suffix, tensor in zip(suffixes, (factors.A, factors.B), strict=True):
            if tensor.shape[0] != 1 or not tensor.numel() or not is_finite(tensor):
                raise AdapterError(
                    f"not writing {path}: {name}{suffix} of shape {tuple(tensor.shape)} is empty, stacked or not finite"
                )
            tensors[KEY_PREFIX + name + suffix] = tensor[0].detach().cpu().contiguous()
    more = {name + KEY_MAGNITUDE: m for name, m in (magnitudes or {}).items()} | dict(modules or {})
    more |= {name + KEY_BIAS: bias for name, bias in (biases or {}).items()}
    # A tied head is its embedding, and the format takes no tensor twice.
    tensors |= {KEY_PREFIX + key: tensor.detach().cpu().contiguous().clone() for key, tensor in more.items()}
    with atomic_folder(Path(path), size=sum(tensor.nbytes for tensor in tensors.values())) as folder:
        save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        (folder / CONFIG_NAME).write_text(json.dumps(_json_config(config), indent=2, sort_keys=True) + "\n")
        write_files(folder, files or {})


def universal_config(
    layers: Mapping[str, LoRAFactors],
    *,
    base_model: str,
    revision: str | None = None,
    fan_in_fan_out: bool = False,
    lora_bias: bool = False,
    modules_to_save: Collection[str] = (),
    task_type: str | None = "CAUSAL_LM",
    auto_mapping: Mapping[str, str] | None = None,
    use_dora: bool = False,
) -> dict[str, Any]:
    """Return the entries of the configuration that every server loads, as PEFT's ``LoraConfig`` writes them.

    They say one rank R for all layers, ``lora_alpha = R`` and nothing optional.
    ``lora_bias``, ``modules_to_save`` and ``use_dora`` are what no server loads; they are there for adapters that were
    trained so.

    Args:
        layers: what it describes.
        base_model: name or path of the base model.
        revision: as in :class:`Adapter`.
        fan_in_fan_out: as in :class:`Adapter`.
        lora_bias: the layers carry biases.
        modules_to_save: names of modules whose full weights are in the folder.
        task_type: as in :class:`Adapter`.
        auto_mapping: likewise.
        use_dora: the layers have magnitudes.

    Raises:
        AdapterError: if the layers differ in rank.
    """
    ranks = sorted({factors.rank for factors in layers.values()})
    if len(ranks) != 1:
        raise AdapterError(f"servers need one rank for all layers, got {ranks or 'no layer'}")
    return {
        **LORA_DEFAULTS,
        "peft_version": version("peft"),
        "task_type": task_type,
        "auto_mapping": None if auto_mapping is None else dict(auto_mapping),
        "base_model_name_or_path": base_model,
        "revision": revision,
        "r": ranks[0],
        "lora_alpha": ranks[0],
        "target_modules": sorted(set(map(_target_name, layers))),
        "fan_in_fan_out": fan_in_fan_out,
        "lora_bias": lora_bias,
        "modules_to_save": sorted(modules_to_save) or None,
        "use_dora": use_dora,
    }


def _target_name(path: str) -> str:
    """Return the end of a layer's path that is no bare number: ``mlp.0``, as ``0`` would target
    ``layers.0`` as well.
    """
    parts = path.split(".")
    start = next((i for i in reversed(range(len(parts))) if not parts[i].isdigit()), 0)
    return ".".join(parts[start:])


def _json_config(config: LoraConfig | Mapping[str, Any]) -> dict[str, Any]:
    entries = config if isinstance(config, Mapping) else config.to_dict()
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in entries.items()}
    return {**plain, "inference_mode": True}
