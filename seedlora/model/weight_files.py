"""Read the weights of a base model's folder by layer path, in blocks of rows.

Shape legend: ``D`` output features, ``K`` input features, ``P`` rows of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from seedlora.model.embedded import EMBEDDED, embedded_folder
from seedlora.model.layer_names import LayerNames
from seedlora.utils.hub import local_folder
from seedlora.utils.plain_data import from_json

#: What a model folder holds besides weights, by ``from_pretrained`` and tokenizers; other files are left behind.
MODEL_FILES = (
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.py",
    "*.tiktoken",
    "*.spm",
    "additional_chat_templates/*.jinja",
)
#: Of these, what is not of the model: an adapter beside it would be loaded with it, and indices are of weights.
_NOT_OF_THE_MODEL = ("adapter_config.json", "*.index.json")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
#: Names of heads, which may be the embedding under another name.
_HEADS = ("lm_head", "embed_out", "output")
_TIED = " (a tied head has no weight of its own: untie it, or keep the adapter apart)"
_LFS_POINTER = b"version https://git-lfs.github.com/"
_INT8_SCALE = ".SCB"
#: Ends the name of the tensor in which bitsandbytes describes a 4-bit weight.
_NF4_STATE = ".quant_state.bitsandbytes__"


class WeightFiles:
    """A base model as adapters see it: one weight per layer path. Nothing is opened before something is asked for.

    Weights that bitsandbytes stored in 4 or 8 bits are dequantised, a layer at a time.

    Args:
        source: ``embedded``, a folder with safetensors files, or a hub id.
        cached: of a hub id, download nothing: its snapshot is on this machine, or there is none.
    """

    def __init__(self, source: str | Path, *, cached: bool = False) -> None:
        self.source, self.cached = source, cached
        #: What PiSSA or OLoRA would take out of a weight, by what it depends on: all adapters of a set need the same.
        self.initial_factors: dict[tuple[str, str, int, float], tuple[Tensor, Tensor]] = {}
        self._handles: dict[Path, safe_open] = {}
        self._last: tuple[str, Tensor] | None = None

    @cached_property
    def folder(self) -> Path:
        """Return the local folder of the model.

        Raises:
            ValueError: if there is no such folder or hub repository.
        """
        if not str(self.source):
            raise ValueError("no base model is named")
        if self.source == EMBEDDED:
            return embedded_folder()
        return local_folder(self.source, "model folder", ("*.safetensors", *MODEL_FILES), cached=self.cached)

    @cached_property
    def files(self) -> dict[str, Path]:
        """Return the file of every tensor, by the tensor's key.

        Raises:
            ValueError: if a file is broken, or the weights are quantised in a way that cannot be undone here.
            FileNotFoundError: if there are no safetensors files.
        """
        found = {}
        for file in shards(self.folder):
            found.update(dict.fromkeys(self._handle(file).keys(), file))
            self.close(file)
        if self.quantization not in (None, "bitsandbytes"):
            raise ValueError(
                f"base model {self.source} is quantised by {self.quantization}; only bitsandbytes can be undone: give "
                "the model that it was made of, or keep the adapter apart"
            )
        return found

    def _handle(self, file: Path) -> safe_open:
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(broken_weights(file, error)) from None
        return self._handles[file]

    def close(self, file: Path) -> None:
        """Let go of a file's pages, once no tensor of it is in use; it is opened again when it is needed."""
        self._handles.pop(file, None)

    @cached_property
    def config(self) -> dict[str, Any]:
        """Return the content of ``config.json``; nothing if there is none.

        Raises:
            ValueError: if it is broken.
        """
        file = self.folder / "config.json"
        return _read_object(file) if file.is_file() else {}

    @property
    def quantization(self) -> str | None:
        """Return the method by which ``config.json`` says that the weights are quantised, such as ``bitsandbytes``; or
        None.
        """
        entry = self.config.get("quantization_config")
        method = entry.get("quant_method") if isinstance(entry, dict) else None
        return str(method or "an unknown method") if entry else None

    @property
    def stored_as(self) -> str:
        """Return how the weights are stored: ``nf4``, ``fp4``, ``int8`` (bitsandbytes), another method, or ``none``."""
        if self.quantization != "bitsandbytes":
            return self.quantization or "none"
        entry = self.config["quantization_config"]
        return "int8" if entry.get("load_in_8bit") else str(entry.get("bnb_4bit_quant_type", "fp4"))

    @property
    def vocabulary_size(self) -> int | None:
        """Return the number of rows of the embedding that ``config.json`` names."""
        return next((part["vocab_size"] for part in self._parts if isinstance(part.get("vocab_size"), int)), None)

    @property
    def ties_head(self) -> bool:
        """Return whether the head is the input embedding, as it is in transformers unless ``config.json`` says
        otherwise.
        """
        said = [bool(part["tie_word_embeddings"]) for part in self._parts if "tie_word_embeddings" in part]
        return any(said) or not said

    @property
    def _parts(self) -> list[dict[str, Any]]:
        """Return the configuration of the language model within a larger one, if there is one, and then the whole."""
        text = self.config.get("text_config")
        return [*([text] if isinstance(text, dict) else []), self.config]

    def key(self, path: str, parameter: str = "weight") -> str:
        """Return the key of a layer's weight, of which a checkpoint may lack the first parts of the path, or have more.

        Raises:
            ValueError: if there is none, or more than one could be meant.
        """
        parts = f"{path}.{parameter}".split(".")
        if (key := ".".join(parts)) in self.files:
            return key
        if (same := self._names.find(key)) is not None:
            return same
        for start in range(1, max(1, len(parts) - 2)):
            if (key := ".".join(parts[start:])) in self.files:
                return key
        longer = [key for key in self.files if key.endswith(f".{path}.{parameter}")]
        if len(longer) == 1:
            return longer[0]
        tied = self.ties_head and path.rpartition(".")[2] in _HEADS
        raise ValueError(
            f"the base model {self.source} has {'more than one' if longer else 'no'} {parameter} for the adapted layer "
            f"{path}{_TIED if tied else ''}"
        )

    @cached_property
    def _names(self) -> LayerNames:
        return LayerNames(self.files)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape that a tensor has in the model, from the file's header or a 4-bit weight's description."""
        if (state := self._state_key(key)) is not None:
            try:
                return tuple(map(int, from_json(bytes(self.tensor(state).tolist()))["shape"]))
            except (ValueError, TypeError, KeyError):
                raise ValueError(f"{self.files[state]}: '{state}' does not describe a 4-bit weight") from None
        return tuple(self._handle(self.files[key]).get_slice(key).get_shape())

    def tensor(self, key: str) -> Tensor:
        """Return a tensor as it is stored."""
        return self._handle(self.files[key]).get_tensor(key)

    def weight(self, key: str) -> Tensor:
        """Return a whole weight, dequantised if need be: int8 to float32, 4 bits to the dtype that they were made of.

        Raises:
            ValueError: if bitsandbytes is needed and not installed.
        """
        if (state := self._state_key(key)) is not None:
            prefix = f"{key}."
            return _dequantized(
                self.tensor(key),
                {name.removeprefix(prefix): self.tensor(name) for name in self.quantization_keys(key)},
                state,
            )
        if (scale := self._int8_scale(key)) is not None:
            return self.tensor(key).float() * (self.tensor(scale).float()[:, None] / 127)
        return self.tensor(key)

    def in_original_dtype(self, key: str, weight: Tensor) -> Tensor:
        """Return a weight out of int8 in the dtype that ``config.json`` says it was made of, others unchanged."""
        if self._int8_scale(key) is None:
            return weight
        said = (getattr(torch, str(part.get(name)), None) for part in self._parts for name in ("dtype", "torch_dtype"))
        return weight.to(next((dtype for dtype in said if isinstance(dtype, torch.dtype)), weight.dtype))

    def quantization_keys(self, key: str) -> list[str]:
        """Return the keys of the tensors that belong to a quantised weight: its scales and descriptions; none for
        others.
        """
        if self.quantization is None:
            return []
        layer = key.removesuffix(".weight")
        int8 = [name for name in (layer + _INT8_SCALE, f"{layer}.weight_format") if name in self.files]
        return [name for name in self.files if name.startswith(f"{key}.")] + int8

    def row_reader(self, path: str, *, flipped: bool = False) -> Callable[[int, int], Float[Tensor, "P K"]]:
        """Return a function that reads rows ``start`` to ``stop`` of a layer's weight, laid out ``(D, K)``.

        Args:
            path: of the layer.
            flipped: the weight is stored as ``(K, D)``: ``Conv1D`` of GPT-2, and embeddings.
        """
        return self.row_reader_of(self.key(path), flipped=flipped)

    def row_reader_of(self, key: str, *, flipped: bool = False) -> Callable[[int, int], Float[Tensor, "P K"]]:
        """Return the same function as :meth:`row_reader`, for the matrix of a key."""
        quantised = bool(self.quantization_keys(key))

        def read(start: int, stop: int) -> Float[Tensor, "P K"]:
            part = self._last_dequantized(key) if quantised else self._handle(self.files[key]).get_slice(key)
            return part[:, start:stop].T if flipped else part[start:stop]

        return read

    def _last_dequantized(self, key: str) -> Tensor:
        """Return a dequantised weight; the last one is kept, because it is read row by row."""
        if self._last is None or self._last[0] != key:
            self._last = (key, self.weight(key))
        return self._last[1]

    def _int8_scale(self, key: str) -> str | None:
        scale = key.removesuffix(".weight") + _INT8_SCALE
        return scale if scale in self.quantization_keys(key) else None

    def _state_key(self, key: str) -> str | None:
        return next((name for name in self.quantization_keys(key) if name.startswith(key + _NF4_STATE)), None)


def shards(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder that ``from_pretrained`` loads, in the order of their names.

    One file comes before an index, which an older save may have left.

    Raises:
        FileNotFoundError: if it has none.
        ValueError: if its index is broken, or a file of it is missing or lies elsewhere.
    """
    if (single := folder / _SINGLE).is_file():
        return [single]
    index = folder / _INDEX
    if not index.is_file():
        raise FileNotFoundError(f"{folder} holds no {_SINGLE} and no {_INDEX}{_other_weights(folder)}")
    names = _read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index} has no weight_map from keys to files")
    files = [folder / name for name in sorted(set(names.values()))]
    if outside := [file for file in files if file.parent != folder or file.name in ("", "..")]:
        raise ValueError(f"{index} names {outside[0]}, which is no file beside it")
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(
            f"{folder} lacks {missing[0]}: {len(missing)} of the {len(files)} files that its index names are missing; "
            "was the download cut short?"
        )
    return files


def companions(folder: Path) -> list[Path]:
    """Return what a model folder holds besides weights: configurations, tokenizer, templates, code."""
    found = {file for pattern in MODEL_FILES for file in folder.glob(pattern) if file.is_file()}
    own = {file for file in found if not any(fnmatch(file.name, pattern) for pattern in _NOT_OF_THE_MODEL)}
    return sorted(own if (folder / _SINGLE).is_file() else own | (found & {folder / _INDEX}))


def broken_weights(file: Path, error: Exception) -> str:
    """Say why a file of weights cannot be read, and what to do: the pointer of a clone without Git LFS, for example."""
    try:
        with file.open("rb") as handle:
            start = handle.read(len(_LFS_POINTER))
    except OSError as cause:
        return f"{file} cannot be read: {cause.strerror or cause}"
    if start == _LFS_POINTER:
        return f"{file} is a Git LFS pointer and no weights: run git lfs pull in its folder, or download it again"
    return f"{file} is not a whole safetensors file, so download or save it again: {error}"


def _other_weights(folder: Path) -> str:
    """Say which other files of weights a folder has; the end of a sentence."""
    found = sorted(
        file.name for pattern in ("*.bin", "*.pth", "*.gguf", "*.safetensors") for file in folder.glob(pattern)
    )
    return f"; there is {found[0]}, which is not read here: save it by save_pretrained" if found else ""


def _read_object(file: Path) -> dict[str, Any]:
    try:
        found = from_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no JSON object but {str(found)[:80]}")
    return found


def _dequantized(packed: Tensor, statistics: Mapping[str, Tensor], state: str) -> Tensor:
    try:
        from bitsandbytes import functional
    except ImportError:
        raise ValueError(
            f"{state} is a 4-bit weight of bitsandbytes, which is not installed: pip install bitsandbytes, or give the "
            "model that it was made of"
        ) from None
    quantized = functional.QuantState.from_dict(dict(statistics), device=packed.device)
    return functional.dequantize_4bit(packed, quantized)
