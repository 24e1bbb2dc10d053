"""PEFT adapter folders, read and written. The only module that knows PEFT's key names and its scaling."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from seedlora.adapters.adapter import (
    BASE_NAME,
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
    Start,
    is_finite,
    is_model,
    locate,
)
from seedlora.adapters.original_base import base_key_of, without_start
from seedlora.model.peft_internals import pattern_key
from seedlora.model.weight_files import WeightFiles
from seedlora.updates.factors import LoRAFactors

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: Configuration keys of adapters that are more than factors: read where the caller can take what else they hold.
_MORE_THAN_FACTORS = {
    "use_dora": "DoRA is not plain LoRA: its update depends on the base weights; python -m seedlora merge fuses it, "
    "and makes plain LoRA of a single one (--method soup --rank 64)",
    "lora_bias": "lora_bias adds a vector that factors do not hold; python -m seedlora merge averages it",
    "modules_to_save": "modules_to_save holds full weights besides the factors; python -m seedlora merge averages them",
}
#: Configuration keys of adapters that cannot be fused, and what to do about each.
_REFUSED = {
    "use_qalora": "QALoRA pools its inputs; train with use_qalora: false",
    "use_bdlora": "BD-LoRA has block-diagonal factors; train without use_bdlora",
    "arrow_config": "an arrow router is no single update; give its adapters one by one",
    "alora_invocation_tokens": "an activated LoRA applies to part of the text only; it cannot be fused",
    "trainable_token_indices": "trainable_token_indices holds full rows besides the factors; train without it",
    "target_parameters": "target_parameters adapts parameters that are no layers; target modules instead",
    "layer_replication": "layer_replication changes the base model; it cannot be fused",
    "megatron_config": "Megatron's parallel layers are not read; export the adapter for transformers",
    "kasa_config": "KaSA's update is not B @ A; train plain LoRA",
    "monteclora_config": "MonteCLoRA's update is random; train plain LoRA",
    "velora_config": "VeLoRA adapters are not read; train plain LoRA",
}
#: PEFT's task types, and its class that loads adapter and base model of each.
TASKS = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}
#: Ways to initialise a LoRA that leave the base weights alone.
_PLAIN_INITS = {"gaussian", "eva", "orthogonal", "mica"}
#: Ways that take the start out of the base weights, and can be done again from these alone.
_REPEATED_INITS = {"pissa", "olora"}
_CONVERT = "PEFT's save_pretrained with path_initial_model_for_weight_conversion"


def base_model_of(source: str | Path) -> str:
    """The base model that an adapter folder or hub id names, or an empty text.

    Raises:
        AdapterError: if its configuration cannot be read.
    """
    return _read_config(locate(source), more=True).get("base_model_name_or_path") or ""


def quantization_of(folder: Path) -> str:
    """What the base model has to be quantised to for an adapter that belongs on no other: ``nf4``, or else ``none``.

    Raises:
        AdapterError: if its record says nothing that can be read.
    """
    file = folder / BASE_NAME
    if not file.is_file():
        return "none"
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise AdapterError(f"{file} cannot be read: {error}") from None
    kind = record.get("quantization", "none") if isinstance(record, dict) else None
    if not isinstance(kind, str):
        raise AdapterError(f"{file}: {str(record)[:80]!r} is no record of a quantization")
    return kind


def read_adapter(
    path: str | Path,
    *,
    base: WeightFiles | None = None,
    keep_start: bool = False,
    on_layer: Callable[[str], object] | None = None,
) -> Adapter:
    """Read a PEFT LoRA folder and fold its scaling into ``B``.

    The scaling is ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with rsLoRA; a layer's rank and alpha may come from
    ``rank_pattern`` and ``alpha_pattern``.

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
            cannot be fused. Nothing else comes out.
    """
    path = Path(path)
    config = _read_config(path, more=base is not None)
    tensors, copies = _read_tensors(path / WEIGHTS_NAME)
    file = path / WEIGHTS_NAME
    modules = _take_modules(tensors, config)
    magnitudes = _take(tensors, KEY_MAGNITUDE) if config.get("use_dora") else {}
    biases = _take(tensors, KEY_BIAS) if config.get("lora_bias") else {}
    layers, embeddings, scalings = {}, set(), {}
    for key in sorted(tensors):
        suffix = next((s for s in (KEY_A, KEY_B, KEY_EMBEDDING_A, KEY_EMBEDDING_B) if key.endswith(s)), None)
        if suffix is None or not key.startswith(KEY_PREFIX) or len(key) <= len(KEY_PREFIX) + len(suffix):
            raise AdapterError(f"{file}: '{key}' is no factor of plain LoRA on a linear or embedding layer{_why(key)}")
        name = key.removeprefix(KEY_PREFIX).removesuffix(suffix)
        partner = {KEY_A: KEY_B, KEY_B: KEY_A, KEY_EMBEDDING_A: KEY_EMBEDDING_B, KEY_EMBEDDING_B: KEY_EMBEDDING_A}[
            suffix
        ]
        if (other := tensors.get(KEY_PREFIX + name + partner)) is None:
            raise AdapterError(f"{file}: '{key}' has no {partner} beside it")
        if suffix in (KEY_B, KEY_EMBEDDING_B):
            continue
        if name in layers:
            raise AdapterError(f"{file}: '{name}' has factors of a linear layer and of an embedding")
        a, b = tensors[key], other
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise AdapterError(
                f"{file}: '{key}' has shape {tuple(a.shape)} and its B {tuple(b.shape)}; (r, K) and (D, r) are needed"
            )
        scalings[name] = scaling = _scaling(path, config, name, a.shape[0])
        if _init(config) in _REPEATED_INITS:  # most of it is the start, of which nothing may be left by rounding
            a, b = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (a, b))
        b = _scaled(b, scaling)
        if b is not other and not is_finite(b):
            raise AdapterError(f"{file}: '{name}' overflows {b.dtype} when its scaling is applied")
        if name in biases:
            biases[name] = _scaled(biases[name], scaling)
        layers[name] = LoRAFactors(a[None], b[None])
        if suffix == KEY_EMBEDDING_A:
            embeddings.add(name)
    if not layers:
        raise AdapterError(f"{file} holds no LoRA factors")
    adapter = Adapter(
        layers,
        config.get("base_model_name_or_path") or "",
        frozenset(embeddings),
        bool(config.get("fan_in_fan_out")),
        copies,
        magnitudes,
        biases,
        modules,
        tuple(sorted(config.get("modules_to_save") or ())) if modules else (),
        _kinds(config),
        config.get("task_type"),
        mapping if isinstance(mapping := config.get("auto_mapping"), dict) else None,
        Start(file, _init(config), scalings) if _init(config) in _REPEATED_INITS else None,
        quantization_of(path),
        None if (revision := config.get("revision")) == "main" else revision,
    )
    _check_vectors(file, adapter, config)
    if base is not None and config.get("use_dora"):
        for name in layers:
            base_key_of(file, adapter, name, base)
    return adapter if base is None or keep_start else without_start(adapter, base, on_layer=on_layer)


def _why(key: str) -> str:
    """What a key of another form probably is, and what to do; the end of a sentence."""
    if "lora_" in key:
        own = f"PEFT's own keys begin with {KEY_PREFIX} and end in {KEY_A} or {KEY_B}"
        return f"; {own}: save it with PEFT's save_pretrained"
    if key.startswith(KEY_PREFIX) and key.endswith(".weight"):
        name = key.split(".")[-2]
        return f" but a full weight, as PEFT saves it of a resized vocabulary; add '{name}' to modules_to_save in " + (
            f"{CONFIG_NAME}, and python -m seedlora merge averages it"
        )
    return ""


def _take(tensors: dict[str, Tensor], suffix: str) -> dict[str, Tensor]:
    """Take the tensors of one suffix out, by layer path."""
    keys = [key for key in tensors if key.startswith(KEY_PREFIX) and key.endswith(suffix)]
    return {key.removeprefix(KEY_PREFIX).removesuffix(suffix): tensors.pop(key) for key in keys}


def _take_modules(tensors: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Take the full weights of ``modules_to_save`` out, by key within the model."""
    names = [re.escape(name) for name in config.get("modules_to_save") or ()]
    pattern = re.compile(rf"{re.escape(KEY_PREFIX)}(?:.*\.)?(?:{'|'.join(names)})\.(?!.*lora_)")
    keys = [key for key in tensors if names and pattern.match(key)]
    return {key.removeprefix(KEY_PREFIX): tensors.pop(key) for key in keys}


def _kinds(config: Mapping[str, Any]) -> tuple[str, ...]:
    inits = {"pissa": "PiSSA", "olora": "OLoRA"}
    flags = {
        "rsLoRA": config.get("use_rslora"),
        "DoRA": config.get("use_dora"),
        inits.get(_init(config), ""): _init(config) in inits,
        "rank_pattern": config.get("rank_pattern"),
        "alpha_pattern": config.get("alpha_pattern"),
        "lora_bias": config.get("lora_bias"),
        "modules_to_save": config.get("modules_to_save"),
    }
    return tuple(name for name, there in flags.items() if there)


def _init(config: Mapping[str, Any]) -> str:
    """How its start was made, in lower case; empty for the plain way."""
    init = config.get("init_lora_weights", True)
    return init.lower() if isinstance(init, str) else ""


def _check_vectors(file: Path, adapter: Adapter, config: Mapping[str, Any]) -> None:
    """One magnitude and one bias per output feature, in every layer, where the configuration says so."""
    wanted = {"use_dora": (adapter.magnitudes, KEY_MAGNITUDE), "lora_bias": (adapter.biases, KEY_BIAS)}
    for key, (vectors, suffix) in wanted.items():
        if not config.get(key):
            continue
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
    return (b.to(torch.promote_types(b.dtype, torch.float32)) * scaling).to(b.dtype)


def _scaling(path: Path, config: Mapping[str, Any], name: str, rank: int) -> float:
    """What PEFT multiplies ``B @ A`` with in this layer, after checking that the layer has the rank it should have."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    try:
        expected = ranks.get(pattern_key(ranks, name), config["r"])
        alpha = alphas.get(pattern_key(alphas, name), config["lora_alpha"])
    except re.error as error:
        raise AdapterError(
            f"{path / CONFIG_NAME}: a key of rank_pattern or alpha_pattern is no regex: {error}"
        ) from None
    if expected != rank:
        raise AdapterError(
            f"{path / WEIGHTS_NAME}: '{name}' has rank {rank}, but {CONFIG_NAME} says {expected}; they must agree"
        )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _read_config(path: Path, *, more: bool = False) -> dict[str, Any]:
    """The configuration, checked; with ``more``, also of adapters that are more than factors."""
    file = path / CONFIG_NAME
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        if is_model(path):
            raise AdapterError(
                f"{path} is a whole model and no adapter; python -m seedlora merge fuses such models by --into-base "
                "MODEL, the one that they were trained from"
            ) from None
        raise AdapterError(f"{path} is no PEFT adapter folder: it has no {CONFIG_NAME}") from None
    except (ValueError, OSError, RecursionError) as error:
        raise AdapterError(f"{file} cannot be read: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise AdapterError(f"{file}: peft_type is {kind!r}, only 'LORA' can be read")
    for key, reason in (_REFUSED if more else _MORE_THAN_FACTORS | _REFUSED).items():
        if config.get(key):
            raise AdapterError(f"{file}: {key} is set; {reason}")
    names = config.get("modules_to_save") or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise AdapterError(f"{file}: modules_to_save is {str(names)[:80]!r}, a list of names is needed")
    init = _init(config)
    if init == "loftq":
        raise AdapterError(
            f"{file}: init_lora_weights is 'loftq', which changes the base weights to those that it quantised; save "
            "that base model, name it as base_model_name_or_path, and set init_lora_weights to true"
        )
    if init and init.split("_")[0] not in _PLAIN_INITS and not (more and init in _REPEATED_INITS):
        how = (
            "python -m seedlora merge computes what was taken out of them again"
            if init in _REPEATED_INITS
            else f"what was taken out of them cannot be computed again: convert the adapter after training ({_CONVERT})"
        )
        raise AdapterError(f"{file}: init_lora_weights is {init!r}, which changes the base weights; {how}")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{file}: bias is {config['bias']!r}; only 'none' can be fused")
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(config.get(key), str | None):
            raise AdapterError(f"{file}: {key} is {str(config[key])[:80]!r}, text is needed")
    if config.get("task_type") not in (None, *TASKS):
        raise AdapterError(
            f"{file}: task_type is {str(config['task_type'])[:80]!r}, one of {', '.join(TASKS)} is needed"
        )
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


def _read_tensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, tuple[int, str]]]:
    """The tensors of the file, and rows and sha256 of the base weights among them, by layer path."""
    if not file.is_file():
        found = sorted(other.name for other in file.parent.glob("adapter_model*"))
        there = f"; there is {', '.join(found)}: load it with PEFT and save_pretrained" if found else ""
        raise AdapterError(f"{file} is missing; pickled weights (.bin) and parts of weights are not read{there}")
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
        if not is_finite(tensor):
            raise AdapterError(f"{file}: '{key}' holds NaN or infinity")
        if key.startswith(KEY_PREFIX) and key.endswith(KEY_BASE_COPY):
            data = tensors.pop(key).contiguous().view(torch.uint8).numpy()
            rows = tensor.shape[0] if tensor.ndim else 1
            copies[key.removeprefix(KEY_PREFIX).removesuffix(KEY_BASE_COPY)] = rows, hashlib.sha256(data).hexdigest()
    return tensors, copies
