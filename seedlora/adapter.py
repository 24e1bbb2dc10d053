"""PEFT adapter folders, read and written. The only module that knows PEFT's key names and its scaling."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from seedlora.atomic import atomic_folder
from seedlora.factors import LoRAFactors
from seedlora.hub import local_folder

if TYPE_CHECKING:
    from peft import LoraConfig

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
#: How the adapter's training data was worded, so that it is evaluated and served with the same prompt.
PROMPT_NAME = "prompt.json"
_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
_EMBEDDING_A, _EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"
_BASE_COPY = ".base_layer.weight"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

#: Configuration keys of adapters whose update is more than ``s * B @ A``, and what to do about each.
_REFUSED = {
    "use_dora": "DoRA is not plain LoRA: its update depends on the base weights; merge each adapter into the "
    "base model with PEFT (merge_and_unload), or train with use_dora: false",
    "lora_bias": "lora_bias adds a vector that factors do not hold; train with lora_bias: false",
    "use_qalora": "QALoRA pools its inputs; train with use_qalora: false",
    "use_bdlora": "BD-LoRA has block-diagonal factors; train without use_bdlora",
    "arrow_config": "an arrow router is no single update; give its adapters one by one",
    "alora_invocation_tokens": "an activated LoRA applies to part of the text only; it cannot be fused",
    "modules_to_save": "modules_to_save holds full weights besides the factors; train without it",
    "trainable_token_indices": "trainable_token_indices holds full rows besides the factors; train without it",
    "target_parameters": "target_parameters adapts parameters that are no layers; target modules instead",
    "layer_replication": "layer_replication changes the base model; it cannot be fused",
    "megatron_config": "Megatron's parallel layers are not read; export the adapter for transformers",
    "kasa_config": "KaSA's update is not B @ A; train plain LoRA",
    "monteclora_config": "MonteCLoRA's update is random; train plain LoRA",
    "velora_config": "VeLoRA adapters are not read; train plain LoRA",
}
#: Ways to initialise a LoRA that leave the base weights alone.
_PLAIN_INITS = {"gaussian", "eva", "orthogonal"}


class AdapterError(ValueError):
    """An adapter folder that cannot be read, or holds what cannot be fused. The message names file, key and value."""


@dataclass(frozen=True)
class Adapter:
    """One adapter as read from disk: its update per layer, and the base model it belongs to.

    Args:
        layers: layer path within the base model (``model.layers.0.self_attn.q_proj``) to one adapter (``N = 1``),
            scaling folded into ``B``. An embedding's update is ``(B A)^T``: ``D`` is the width, ``K`` the vocabulary.
        base_model: ``base_model_name_or_path`` of its configuration.
        embeddings: the paths that are embeddings.
        fan_in_fan_out: the base stores its weights as ``(K, D)`` (``Conv1D`` of GPT-2); the factors are the same.
        copies: sha256 of base weights that PEFT put beside the factors of embeddings and heads, by path.
    """

    layers: dict[str, LoRAFactors]
    base_model: str
    embeddings: frozenset[str] = frozenset()
    fan_in_fan_out: bool = False
    copies: Mapping[str, str] = field(default_factory=dict)


def locate(source: str | Path) -> Path:
    """The local folder of an adapter: itself, or a snapshot of a hub repository named ``owner/name``.

    Raises:
        AdapterError: if there is neither.
    """
    try:
        return local_folder(source, "PEFT adapter folder", (CONFIG_NAME, WEIGHTS_NAME, PROMPT_NAME))
    except ValueError as error:
        raise AdapterError(str(error)) from None


def read_adapter(path: str | Path) -> Adapter:
    """Read a PEFT LoRA folder and fold its scaling into ``B``.

    The scaling is ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with rsLoRA; a layer's rank and alpha may come from
    ``rank_pattern`` and ``alpha_pattern``.

    Raises:
        AdapterError: if a file is missing or broken, a value is not finite, a factor lacks its partner, a rank is not
            what the configuration says, or the adapter is not plain LoRA. Nothing else comes out.
    """
    path = Path(path)
    config = _read_config(path)
    tensors, copies = _read_tensors(path / WEIGHTS_NAME)
    file = path / WEIGHTS_NAME
    layers, embeddings = {}, set()
    for key in sorted(tensors):
        suffix = next((s for s in (_A, _B, _EMBEDDING_A, _EMBEDDING_B) if key.endswith(s)), None)
        if suffix is None or not key.startswith(_PREFIX) or len(key) <= len(_PREFIX) + len(suffix):
            raise AdapterError(f"{file}: '{key}' is no factor of plain LoRA on a linear or embedding layer")
        name = key.removeprefix(_PREFIX).removesuffix(suffix)
        partner = {_A: _B, _B: _A, _EMBEDDING_A: _EMBEDDING_B, _EMBEDDING_B: _EMBEDDING_A}[suffix]
        if (other := tensors.get(_PREFIX + name + partner)) is None:
            raise AdapterError(f"{file}: '{key}' has no {partner} beside it")
        if suffix in (_B, _EMBEDDING_B):
            continue
        if name in layers:
            raise AdapterError(f"{file}: '{name}' has factors of a linear layer and of an embedding")
        a, b = tensors[key], other
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise AdapterError(
                f"{file}: '{key}' has shape {tuple(a.shape)} and its B {tuple(b.shape)}; (r, K) and (D, r) are needed"
            )
        b = _scaled(b, _scaling(path, config, name, a.shape[0]))
        if b is not other and not _finite(b):
            raise AdapterError(f"{file}: '{name}' overflows {b.dtype} when its scaling is applied")
        layers[name] = LoRAFactors(a[None], b[None])
        if suffix == _EMBEDDING_A:
            embeddings.add(name)
    if not layers:
        raise AdapterError(f"{file} holds no LoRA factors")
    return Adapter(
        layers,
        config.get("base_model_name_or_path") or "",
        frozenset(embeddings),
        bool(config.get("fan_in_fan_out")),
        copies,
    )


def write_adapter(
    path: str | Path,
    layers: Mapping[str, LoRAFactors],
    config: LoraConfig,
    *,
    files: Mapping[str, str] | None = None,
    embeddings: Collection[str] = (),
) -> None:
    """Write a PEFT folder, whole or not at all.

    Args:
        path: the folder; an older one is replaced.
        layers: one adapter (``N = 1``) per layer path, stored as it is: ``B`` without the scaling that ``config`` says.
        config: PEFT's configuration of it.
        files: further text files of the folder, by name: a model card, for example.
        embeddings: the layer paths that are embeddings.

    Raises:
        AdapterError: if a factor is empty or not finite; nothing is written then.
        OSError: if it cannot be written; an older folder is then untouched.
    """
    tensors = {}
    for name, factors in layers.items():
        suffixes = (_EMBEDDING_A, _EMBEDDING_B) if name in embeddings else (_A, _B)
        for suffix, tensor in zip(suffixes, (factors.A, factors.B), strict=True):
            if tensor.shape[0] != 1 or not tensor.numel() or not _finite(tensor):
                raise AdapterError(
                    f"not writing {path}: {name}{suffix} of shape {tuple(tensor.shape)} is empty, stacked or not finite"
                )
            tensors[_PREFIX + name + suffix] = tensor[0].detach().cpu().contiguous()
    with atomic_folder(Path(path)) as folder:
        save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        (folder / CONFIG_NAME).write_text(json.dumps(_json_config(config), indent=2, sort_keys=True) + "\n")
        for name, text in (files or {}).items():
            (folder / name).write_text(text, encoding="utf-8")


def universal_config(layers: Mapping[str, LoRAFactors], *, base_model: str, fan_in_fan_out: bool = False) -> LoraConfig:
    """The configuration that every server loads: one rank R for all layers, ``lora_alpha = R``, nothing optional.

    Args:
        layers: what it describes.
        base_model: name or path of the base model.
        fan_in_fan_out: as in :class:`Adapter`.

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
        fan_in_fan_out=fan_in_fan_out,
        inference_mode=True,
    )


def _json_config(config: LoraConfig) -> dict[str, Any]:
    entries = config.to_dict()
    entries["inference_mode"] = True
    return {key: sorted(value) if isinstance(value, set) else value for key, value in entries.items()}


def _finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor that is not empty holds no NaN or infinity: either shows in the extremes, found in one pass."""
    return all(math.isfinite(extreme) for extreme in tensor.aminmax())


def _scaled(b: torch.Tensor, scaling: float) -> torch.Tensor:
    if scaling == 1:
        return b
    return (b.to(torch.promote_types(b.dtype, torch.float32)) * scaling).to(b.dtype)


def _scaling(path: Path, config: Mapping[str, Any], name: str, rank: int) -> float:
    """What PEFT multiplies ``B @ A`` with in this layer, after checking that the layer has the rank it should have."""
    from peft.utils.other import get_pattern_key

    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    try:
        expected = ranks.get(get_pattern_key(ranks.keys(), name), config["r"])
        alpha = alphas.get(get_pattern_key(alphas.keys(), name), config["lora_alpha"])
    except re.error as error:
        raise AdapterError(
            f"{path / CONFIG_NAME}: a key of rank_pattern or alpha_pattern is no regex: {error}"
        ) from None
    if expected != rank:
        raise AdapterError(
            f"{path / WEIGHTS_NAME}: '{name}' has rank {rank}, but {CONFIG_NAME} says {expected}; they must agree"
        )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG_NAME
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise AdapterError(f"{path} is no PEFT adapter folder: it has no {CONFIG_NAME}") from None
    except (ValueError, OSError, RecursionError) as error:
        raise AdapterError(f"{file} cannot be read: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise AdapterError(f"{file}: peft_type is {kind!r}, only 'LORA' can be read")
    for key, reason in _REFUSED.items():
        if config.get(key):
            raise AdapterError(f"{file}: {key} is set; {reason}")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.split("_")[0] not in _PLAIN_INITS:
        raise AdapterError(
            f"{file}: init_lora_weights is {init!r}, which changes the base weights; convert the adapter to one of the "
            "original base first (PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{file}: bias is {config['bias']!r}; only 'none' can be fused")
    if not isinstance(config.get("base_model_name_or_path"), str | None):
        raise AdapterError(f"{file}: base_model_name_or_path is {config['base_model_name_or_path']!r}, text is needed")
    _check_number(file, "lora_alpha", config.get("lora_alpha"))
    _check_rank(file, "r", config.get("r"))
    for key, check in (("rank_pattern", _check_rank), ("alpha_pattern", _check_number)):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict):
            raise AdapterError(f"{file}: {key} is {pattern!r}, a mapping is needed")
        for name, value in pattern.items():
            check(file, f"{key}[{name!r}]", value)
    return config


def _check_number(file: Path, key: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise AdapterError(f"{file}: {key} is {str(value)[:80]!r}, a number is needed")


def _check_rank(file: Path, key: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise AdapterError(f"{file}: {key} is {str(value)[:80]!r}, a positive whole number is needed")


def _read_tensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of the file, and the sha256 of the base weights among them, by layer path."""
    if not file.is_file():
        raise AdapterError(f"{file} is missing; pickled weights (.bin) are not read")
    try:
        with safe_open(file, framework="pt") as handle:
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"{file} is not a whole safetensors file: {error}") from None
    copies = {}
    for key, tensor in list(tensors.items()):
        if not tensor.numel():
            raise AdapterError(f"{file}: '{key}' is empty, shape {tuple(tensor.shape)}")
        if tensor.dtype not in _FLOATS:
            raise AdapterError(f"{file}: '{key}' is {tensor.dtype}; factors are {', '.join(map(str, _FLOATS))}")
        if not _finite(tensor):
            raise AdapterError(f"{file}: '{key}' holds NaN or infinity")
        if key.startswith(_PREFIX) and key.endswith(_BASE_COPY):
            data = tensors.pop(key).contiguous().view(torch.uint8).numpy()
            copies[key.removeprefix(_PREFIX).removesuffix(_BASE_COPY)] = hashlib.sha256(data).hexdigest()
    return tensors, copies
