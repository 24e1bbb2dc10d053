"""Compare base weights that PEFT saved beside an adapter's factors with those of the base model.

PEFT does so of embeddings and heads that are adapted, and loads them over the base model's. A fused adapter has none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from seedlora.adapters.adapter import KEY_BASE_COPY, AdapterError
from seedlora.model.weight_files import WeightFiles

#: How far a weight that was trained over in bfloat16 may be from the one that was loaded.
_ROUNDED = float(torch.finfo(torch.bfloat16).eps)
#: Below this a weight in float16 is nothing.
_NOTHING = float(torch.finfo(torch.float16).smallest_normal)
#: Rows that are compared at a time.
_ROWS = 4096


def rows_and_sha256(copy: Tensor) -> tuple[int, str]:
    """Return what is remembered of a copy: its rows, and a hash of its values."""
    data = bytes(copy.reshape(-1).contiguous().view(torch.uint8).numpy())
    return copy.shape[0] if copy.ndim else 1, hashlib.sha256(data).hexdigest()


def check_copies(copies: Mapping[str, Tensor], file: Path, base: WeightFiles) -> None:
    """Check that copies are what the base model has, as far as they were rounded.

    A copy of another shape is of a resized vocabulary, which :func:`seedlora.merge.inputs.check_vocabulary` refuses
    where it matters. Where the base model is not on this machine, nothing is compared.

    Args:
        copies: by layer path.
        file: of the adapter's weights, for messages.
        base: the base model.

    Raises:
        AdapterError: naming the layer, and how many of its rows differ.
    """
    files = WeightFiles(base.source, cached=True)
    for path, copy in copies.items():
        try:
            key = files.key(path)
            differing = _differing_rows(copy, files, key) if files.shape(key) == tuple(copy.shape) else 0
        except (ValueError, OSError, SafetensorError):  # the head is tied, or the files are not here
            continue
        if differing:
            raise AdapterError(
                f"{file}: '{path}{KEY_BASE_COPY}' differs from {key} of the base model {base.source} in {differing} of "
                f"{len(copy)} rows, and what an adapter was trained over is lost where it is merged; save the base "
                "model with these weights, and name it as base_model_name_or_path, or by --base"
            )


def _differing_rows(copy: Tensor, files: WeightFiles, key: str) -> int:
    read, found = files.row_reader_of(key), 0
    for start in range(0, len(copy), _ROWS):
        mine, base = copy[start : start + _ROWS].float(), read(start, start + _ROWS).float()
        found += int((~torch.isclose(mine, base, rtol=_ROUNDED, atol=_NOTHING)).any(1).sum())
    return found
