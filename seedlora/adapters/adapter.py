"""Hold an adapter in memory, and name its files and keys."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from seedlora.model.tokenizer_files import TOKENIZER_FILES
from seedlora.updates.factors import LoRAFactors
from seedlora.utils.hub import local_folder
from seedlora.utils.plain_data import from_json

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
#: How the adapter's training data was worded, so that it is evaluated and served with the same prompt.
PROMPT_NAME = "prompt.json"
#: What the base model has to be quantised to, where an adapter belongs on no other.
BASE_NAME = "base.json"
KEY_PREFIX = "base_model.model."
KEY_A, KEY_B = ".lora_A.weight", ".lora_B.weight"
KEY_EMBEDDING_A, KEY_EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"
KEY_BASE_COPY = ".base_layer.weight"
KEY_MAGNITUDE, KEY_BIAS = ".lora_magnitude_vector", ".lora_B.bias"


class AdapterError(ValueError):
    """An adapter folder cannot be read, or holds what cannot be merged. The message names file, key and value."""


@dataclass(frozen=True)
class StartRecord:
    """States how an adapter's factors were started from the base weights, and that PEFT took that start out of them.

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
    """An adapter as read from disk: its update per layer, and the base model it belongs to.

    Args:
        layers: layer path within the base model (``model.layers.0.self_attn.q_proj``) to one adapter (``N = 1``),
            scaling folded into ``B``. An embedding's update is ``(B A)^T``: ``D`` is the width, ``K`` the vocabulary.
        base_model: ``base_model_name_or_path`` of its configuration.
        embeddings: the paths that are embeddings.
        transposed: the paths whose base weight is stored as ``(K, D)`` (``Conv1D`` of GPT-2); the factors are the same.
        copies: rows and sha256 of base weights that PEFT put beside the factors of embeddings and heads, by path.
        magnitudes: DoRA's, by layer path, shape ``(D,)``. The update is then not ``B A`` alone:
            :func:`seedlora.updates.dora.dora_updates`.
        biases: what ``lora_bias`` adds to a layer's output, by path, scaling included, shape ``(D,)``.
        modules: full weights of ``modules_to_save``, by key within the model (``lm_head.weight``).
        modules_to_save: the names under which the configuration has them.
        kinds: what it is besides plain LoRA, for people: ``DoRA``, ``rsLoRA``, ``PiSSA``.
        task_type: PEFT's, which says around which head the model is wrapped; None if it is not said.
        auto_mapping: the class of the base model, which PEFT says where it knows no task.
        start: of PiSSA and OLoRA, as long as it is still in the factors: :func:`without_start` subtracts it.
        quantization: what the base model has to be quantised to: :func:`quantization_of`.
        revision: of the base model on the hub; None for its main one.
        stored_dtype: of the factors in the file; None if what is written belongs in float32 all the same.
        renamed: its tensors are stored under names by which PEFT would not find the base model's layers.
    """

    layers: Mapping[str, LoRAFactors]
    base_model: str
    embeddings: frozenset[str] = frozenset()
    transposed: frozenset[str] = frozenset()
    copies: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    magnitudes: Mapping[str, Float[Tensor, " D"]] = field(default_factory=dict)
    biases: Mapping[str, Float[Tensor, " D"]] = field(default_factory=dict)
    modules: Mapping[str, Tensor] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    task_type: str | None = None
    auto_mapping: Mapping[str, str] | None = None
    start: StartRecord | None = None
    quantization: str = "none"
    revision: str | None = None
    stored_dtype: torch.dtype | None = None
    renamed: bool = False

    @property
    def fan_in_fan_out(self) -> bool:
        """Return what PEFT's configuration says of the whole adapter, although it may have layers of both kinds."""
        return bool(self.transposed)

    def flipped(self, path: str) -> bool:
        """Return whether the base stores this layer's weight as ``(K, D)``."""
        return path in self.transposed or path in self.embeddings


def is_model(folder: str | Path) -> bool:
    """Return whether a folder holds a whole model and not an adapter."""
    return (Path(folder) / "config.json").is_file() and not (Path(folder) / CONFIG_NAME).is_file()


def is_trained(folder: Path) -> bool:
    """Return whether the adapter, or the whole model, of this folder was written: such a folder is whole or
    not there.
    """
    return (folder / CONFIG_NAME).is_file() or is_model(folder)


def locate(source: str | Path, *, kind: str = "PEFT adapter folder") -> Path:
    """Return the local folder of an adapter: itself, or a snapshot of a hub repository named ``owner/name``.

    Args:
        source: folder or hub id.
        kind: what it should be, for the message.

    Raises:
        AdapterError: if there is neither.
    """
    try:
        return local_folder(source, kind, (CONFIG_NAME, WEIGHTS_NAME, PROMPT_NAME, BASE_NAME, *TOKENIZER_FILES))
    except ValueError as error:
        raise AdapterError(str(error)) from None


def quantization_of(folder: Path) -> str:
    """Return the quantisation of the base model that an adapter belongs on alone: ``nf4``, or else ``none``.

    Raises:
        AdapterError: if its record says nothing that can be read.
    """
    file = folder / BASE_NAME
    if not file.is_file():
        return "none"
    try:
        record = from_json(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise AdapterError(f"{file} cannot be read: {error}") from None
    kind = record.get("quantization", "none") if isinstance(record, dict) else None
    if not isinstance(kind, str):
        raise AdapterError(f"{file}: {str(record)[:80]!r} is no record of a quantization")
    return kind


def adapter_sha256(folder: Path) -> str | None:
    """Return the sha256 of the weights in an adapter's folder; ``None`` without a file of them."""
    file = folder / WEIGHTS_NAME
    return files_sha256([file]) if file.is_file() else None


def files_sha256(files: Sequence[Path]) -> str:
    """Return the sha256 of the files' bytes, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            hashlib.file_digest(handle, lambda: digest)
    return digest.hexdigest()


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether a tensor, which is not empty, holds no NaN or infinity: either shows in its extremes,
    in one pass.
    """
    return all(math.isfinite(extreme) for extreme in tensor.aminmax())
