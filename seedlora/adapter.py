"""PEFT adapter folders, read and written. The only module that knows PEFT's key names and its scaling."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from seedlora.atomic import atomic_folder
from seedlora.base_weights import BaseWeights
from seedlora.factors import LoRAFactors
from seedlora.hub import local_folder

if TYPE_CHECKING:
    from peft import LoraConfig

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
#: How the adapter's training data was worded, so that it is evaluated and served with the same prompt.
PROMPT_NAME = "prompt.json"
#: What the base model has to be quantised to, where an adapter belongs on no other.
BASE_NAME = "base.json"
_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
_EMBEDDING_A, _EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"
_BASE_COPY = ".base_layer.weight"
_MAGNITUDE, _BIAS = ".lora_magnitude_vector", ".lora_B.bias"
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


class AdapterError(ValueError):
    """An adapter folder that cannot be read, or holds what cannot be fused. The message names file, key and value."""


@dataclass(frozen=True)
class Start:
    """What the factors of an adapter started at, and PEFT took out of the base weights.

    Args:
        file: of the adapter, for messages.
        init: ``pissa`` or ``olora``.
        scalings: what PEFT multiplies ``B @ A`` with, by layer path.
    """

    file: Path
    init: str
    scalings: Mapping[str, float]


@dataclass(frozen=True)
class Adapter:
    """One adapter as read from disk: its update per layer, and the base model it belongs to.

    Args:
        layers: layer path within the base model (``model.layers.0.self_attn.q_proj``) to one adapter (``N = 1``),
            scaling folded into ``B``. An embedding's update is ``(B A)^T``: ``D`` is the width, ``K`` the vocabulary.
        base_model: ``base_model_name_or_path`` of its configuration.
        embeddings: the paths that are embeddings.
        fan_in_fan_out: the base stores its weights as ``(K, D)`` (``Conv1D`` of GPT-2); the factors are the same.
        copies: rows and sha256 of base weights that PEFT put beside the factors of embeddings and heads, by path.
        magnitudes: DoRA's, by layer path, shape ``(D,)``. The update is then not ``B A`` alone:
            :func:`seedlora.dora.dora_updates`.
        biases: what ``lora_bias`` adds to a layer's output, by path, scaling included, shape ``(D,)``.
        modules: full weights of ``modules_to_save``, by key within the model (``lm_head.weight``).
        modules_to_save: the names under which the configuration has them.
        kinds: what it is besides plain LoRA, for people: ``DoRA``, ``rsLoRA``, ``PiSSA``.
        task_type: PEFT's, which says around which head the model is wrapped; None if it is not said.
        auto_mapping: the class of the base model, which PEFT says where it knows no task.
        start: of PiSSA and OLoRA, as long as it is still in the factors: :func:`without_start` subtracts it.
        quantization: what the base model has to be quantised to: :func:`quantization_of`.
        revision: of the base model on the hub; None for its main one.
    """

    layers: dict[str, LoRAFactors]
    base_model: str
    embeddings: frozenset[str] = frozenset()
    fan_in_fan_out: bool = False
    copies: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    magnitudes: Mapping[str, Float[Tensor, " D"]] = field(default_factory=dict)
    biases: Mapping[str, Float[Tensor, " D"]] = field(default_factory=dict)
    modules: Mapping[str, Tensor] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    task_type: str | None = None
    auto_mapping: Mapping[str, str] | None = None
    start: Start | None = None
    quantization: str = "none"
    revision: str | None = None

    def flipped(self, path: str) -> bool:
        """Whether the base stores this layer's weight as ``(K, D)``."""
        return self.fan_in_fan_out or path in self.embeddings


def is_model(folder: str | Path) -> bool:
    """Whether a folder holds a whole model and not an adapter."""
    return (Path(folder) / "config.json").is_file() and not (Path(folder) / CONFIG_NAME).is_file()


def is_trained(folder: Path) -> bool:
    """Whether the adapter, or the whole model, of this folder was written: such a folder is whole or not there."""
    return (folder / CONFIG_NAME).is_file() or is_model(folder)


def locate(source: str | Path) -> Path:
    """The local folder of an adapter: itself, or a snapshot of a hub repository named ``owner/name``.

    Raises:
        AdapterError: if there is neither.
    """
    try:
        return local_folder(source, "PEFT adapter folder", (CONFIG_NAME, WEIGHTS_NAME, PROMPT_NAME, BASE_NAME))
    except ValueError as error:
        raise AdapterError(str(error)) from None


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


def adapter_sha256(folder: Path) -> str | None:
    """Of the weights in an adapter's folder; ``None`` without a file of them."""
    file = folder / WEIGHTS_NAME
    return files_sha256([file]) if file.is_file() else None


def files_sha256(files: Sequence[Path]) -> str:
    """Of the files' bytes, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            hashlib.file_digest(handle, lambda: digest)
    return digest.hexdigest()


def read_adapter(
    path: str | Path,
    *,
    base: BaseWeights | None = None,
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
    magnitudes = _take(tensors, _MAGNITUDE) if config.get("use_dora") else {}
    biases = _take(tensors, _BIAS) if config.get("lora_bias") else {}
    layers, embeddings, scalings = {}, set(), {}
    for key in sorted(tensors):
        suffix = next((s for s in (_A, _B, _EMBEDDING_A, _EMBEDDING_B) if key.endswith(s)), None)
        if suffix is None or not key.startswith(_PREFIX) or len(key) <= len(_PREFIX) + len(suffix):
            raise AdapterError(f"{file}: '{key}' is no factor of plain LoRA on a linear or embedding layer{_why(key)}")
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
        scalings[name] = scaling = _scaling(path, config, name, a.shape[0])
        if _init(config) in _REPEATED_INITS:  # most of it is the start, of which nothing may be left by rounding
            a, b = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (a, b))
        b = _scaled(b, scaling)
        if b is not other and not _finite(b):
            raise AdapterError(f"{file}: '{name}' overflows {b.dtype} when its scaling is applied")
        if name in biases:
            biases[name] = _scaled(biases[name], scaling)
        layers[name] = LoRAFactors(a[None], b[None])
        if suffix == _EMBEDDING_A:
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
            _base_key(file, adapter, name, base)
    return adapter if base is None or keep_start else without_start(adapter, base, on_layer=on_layer)


def without_start(adapter: Adapter, base: BaseWeights, *, on_layer: Callable[[str], object] | None = None) -> Adapter:
    """The adapter relative to the original base weights, if PiSSA or OLoRA took its start out of them.

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
        layers[name] = _minus_start(adapter, adapter.start, name, base)
        if on_layer is not None:
            on_layer(name)
    return replace(adapter, layers=layers, start=None)


def _why(key: str) -> str:
    """What a key of another form probably is, and what to do; the end of a sentence."""
    if "lora_" in key:
        return f"; PEFT's own keys begin with {_PREFIX} and end in {_A} or {_B}: save it with PEFT's save_pretrained"
    if key.startswith(_PREFIX) and key.endswith(".weight"):
        name = key.split(".")[-2]
        return f" but a full weight, as PEFT saves it of a resized vocabulary; add '{name}' to modules_to_save in " + (
            f"{CONFIG_NAME}, and python -m seedlora merge averages it"
        )
    return ""


def _take(tensors: dict[str, Tensor], suffix: str) -> dict[str, Tensor]:
    """Take the tensors of one suffix out, by layer path."""
    keys = [key for key in tensors if key.startswith(_PREFIX) and key.endswith(suffix)]
    return {key.removeprefix(_PREFIX).removesuffix(suffix): tensors.pop(key) for key in keys}


def _take_modules(tensors: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Take the full weights of ``modules_to_save`` out, by key within the model."""
    names = [re.escape(name) for name in config.get("modules_to_save") or ()]
    pattern = re.compile(rf"{re.escape(_PREFIX)}(?:.*\.)?(?:{'|'.join(names)})\.(?!.*lora_)")
    keys = [key for key in tensors if names and pattern.match(key)]
    return {key.removeprefix(_PREFIX): tensors.pop(key) for key in keys}


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
    wanted = {"use_dora": (adapter.magnitudes, _MAGNITUDE), "lora_bias": (adapter.biases, _BIAS)}
    for key, (vectors, suffix) in wanted.items():
        if not config.get(key):
            continue
        for name, factors in adapter.layers.items():
            if suffix == _BIAS and name in adapter.embeddings:
                continue
            if name not in vectors:
                raise AdapterError(f"{file}: {key} is set, but '{name}' has no {suffix}")
            if vectors[name].shape != factors.shape[:1]:
                raise AdapterError(
                    f"{file}: '{name}{suffix}' has shape {tuple(vectors[name].shape)}, {factors.shape[:1]} is needed"
                )
        if odd := sorted(set(vectors) - set(adapter.layers)):
            raise AdapterError(f"{file}: '{odd[0]}' has {suffix} but no factors")


def _base_key(file: Path, adapter: Adapter, name: str, base: BaseWeights) -> str:
    """The key of a layer's base weight, after checking that it is there and has the shape of the update."""
    kind = ", ".join(adapter.kinds)
    if not str(base.source):
        raise AdapterError(
            f"{file.parent} is {kind} and names no base model, whose weights are needed; give --base MODEL"
        )
    with _readable(file, kind):
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
def _readable(file: Path, kind: str) -> Iterator[None]:
    """Name the adapter whose base weights cannot be read."""
    try:
        yield
    except (ValueError, OSError, SafetensorError) as error:
        raise AdapterError(
            f"{file.parent} is {kind}: its update depends on the base weights, which cannot be read: {error} "
            "(give another with --base MODEL)"
        ) from None


def _minus_start(adapter: Adapter, start: Start, name: str, base: BaseWeights) -> LoRAFactors:
    if name in adapter.embeddings:
        raise AdapterError(
            f"{start.file}: '{name}' is an embedding, for which PEFT has no init_lora_weights {start.init!r}"
        )
    factors = adapter.layers[name]
    what = _base_key(start.file, adapter, name, base), start.init, factors.rank, start.scalings[name]
    if what not in base.starts:
        with _readable(start.file, ", ".join(adapter.kinds)):
            weight = base.weight(what[0])
        base.starts[what] = _start(weight, *what[1:], fan_in_fan_out=adapter.fan_in_fan_out)
    a, b = (part.to(factors.dtype) for part in base.starts[what])
    return LoRAFactors(torch.cat([factors.A, a[None]], 1), torch.cat([factors.B, -b[None]], 2))


def _start(weight: Tensor, init: str, r: int, scaling: float, *, fan_in_fan_out: bool) -> tuple[Tensor, Tensor]:
    """``A_0`` and ``B_0``, scaling included, as PEFT's own layer makes them out of a weight."""
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


def write_adapter(
    path: str | Path,
    layers: Mapping[str, LoRAFactors],
    config: LoraConfig,
    *,
    files: Mapping[str, str] | None = None,
    embeddings: Collection[str] = (),
    magnitudes: Mapping[str, Tensor] | None = None,
    biases: Mapping[str, Tensor] | None = None,
    modules: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a PEFT folder, whole or not at all.

    Args:
        path: the folder; an older one is replaced.
        layers: one adapter (``N = 1``) per layer path, stored as it is: ``B`` without the scaling that ``config`` says.
        config: PEFT's configuration of it.
        files: further text files of the folder, by name: a model card, for example.
        embeddings: the layer paths that are embeddings.
        magnitudes: DoRA's, of shape (D,), by layer path.
        biases: what ``lora_bias`` of ``config`` adds to a layer's output, by path.
        modules: full weights of ``modules_to_save`` of ``config``, by key within the model.

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
    more = {name + _MAGNITUDE: m for name, m in (magnitudes or {}).items()} | dict(modules or {})
    more |= {name + _BIAS: bias for name, bias in (biases or {}).items()}
    # A tied head is its embedding, and the format takes no tensor twice.
    tensors |= {_PREFIX + key: tensor.detach().cpu().contiguous().clone() for key, tensor in more.items()}
    with atomic_folder(Path(path), size=sum(tensor.nbytes for tensor in tensors.values())) as folder:
        save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        (folder / CONFIG_NAME).write_text(json.dumps(_json_config(config), indent=2, sort_keys=True) + "\n")
        for name, text in (files or {}).items():
            (folder / name).write_text(text, encoding="utf-8")


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
) -> LoraConfig:
    """The configuration that every server loads: one rank R for all layers, ``lora_alpha = R``, nothing optional.

    ``lora_bias`` and ``modules_to_save`` are what no server loads; they are there for adapters that were trained so.

    Args:
        layers: what it describes.
        base_model: name or path of the base model.
        revision: as in :class:`Adapter`.
        fan_in_fan_out: as in :class:`Adapter`.
        lora_bias: the layers carry biases.
        modules_to_save: names of modules whose full weights are in the folder.
        task_type: as in :class:`Adapter`.
        auto_mapping: likewise.

    Raises:
        AdapterError: if the layers differ in rank.
    """
    from peft import LoraConfig

    ranks = sorted({factors.rank for factors in layers.values()})
    if len(ranks) != 1:
        raise AdapterError(f"servers need one rank for all layers, got {ranks or 'no layer'}")
    return LoraConfig(
        task_type=task_type,
        auto_mapping=None if auto_mapping is None else dict(auto_mapping),
        base_model_name_or_path=base_model,
        revision=revision,
        r=ranks[0],
        lora_alpha=ranks[0],
        target_modules=sorted(set(map(_suffix, layers))),
        fan_in_fan_out=fan_in_fan_out,
        lora_bias=lora_bias,
        modules_to_save=sorted(modules_to_save) or None,
        inference_mode=True,
    )


def _suffix(path: str) -> str:
    """The end of a layer's path that is no bare number: ``mlp.0``, because ``0`` would target ``layers.0`` as well."""
    parts = path.split(".")
    start = next((i for i in reversed(range(len(parts))) if not parts[i].isdigit()), 0)
    return ".".join(parts[start:])


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
        if not _finite(tensor):
            raise AdapterError(f"{file}: '{key}' holds NaN or infinity")
        if key.startswith(_PREFIX) and key.endswith(_BASE_COPY):
            data = tensors.pop(key).contiguous().view(torch.uint8).numpy()
            rows = tensor.shape[0] if tensor.ndim else 1
            copies[key.removeprefix(_PREFIX).removesuffix(_BASE_COPY)] = rows, hashlib.sha256(data).hexdigest()
    return tensors, copies
