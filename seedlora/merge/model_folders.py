"""Write the folder of a base model with other weights, a shard at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from seedlora.adapters.adapter import PROMPT_NAME, AdapterError
from seedlora.adapters.model_card import CARD_NAME, model_card
from seedlora.merge.record import common_files
from seedlora.model.tokenizer_files import CHAT_TEMPLATE_NAME
from seedlora.model.weight_files import WeightFiles, companions
from seedlora.records.fusion import FUSION, FusionRecord
from seedlora.updates.dense import DenseUpdates, Updates
from seedlora.utils.files import atomic_folder, write_files

#: Turns a key, and the tensor that the base model has there, into the tensor that is written.
WeightChange: TypeAlias = Callable[[str, Tensor], Tensor]
#: Rows of a factored update that are multiplied out at a time.
_ROWS = 1024


def write_model(folder: Path, base: WeightFiles, change: WeightChange, *, dtype: str | None = None) -> None:
    """Write a base model with other weights into a folder, a shard at a time, its configuration and tokenizer too.

    Of a shard, what was read of the old one and all of the new one are held until it is written: twice its size.

    Args:
        folder: that exists and is empty.
        base: the model; what is quantised comes out dequantised.
        change: what to write for a key and the tensor that the base has there, called in the order of ``base.files``.
        dtype: of the new weights, for the configuration. Default: that of the base.
    """
    extra_keys = {name for key in base.files if key.endswith(".weight") for name in base.quantization_keys(key)}
    for file in dict.fromkeys(base.files.values()):
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata()
        here = [key for key, home in base.files.items() if home == file and key not in extra_keys]
        tensors = {key: change(key, base.weight(key)) for key in here}
        save_file(tensors, folder / file.name, metadata=metadata)
        del tensors
        base.close(file)
    for extra in companions(base.folder):
        target = folder / extra.relative_to(base.folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(extra, target)
    if base.quantization is not None:
        _edit_configuration(folder, extra_keys, lambda config: config.pop("quantization_config"))
    if dtype is not None:

        def name_dtype(config: dict[str, Any]) -> None:
            config["dtype"] = dtype
            config.pop("torch_dtype", None)

        _edit_configuration(folder, extra_keys, name_dtype)


def write_trained(
    out: str | Path, base: WeightFiles, weights: Mapping[str, Tensor], *, files: Mapping[str, str | bytes] | None = None
) -> None:
    """Write a model that was trained in full, in the dtype of its weights, whole or not at all.

    Args:
        out: the folder; an older one is replaced.
        base: what it was trained from: its other tensors, configuration and tokenizer go with it.
        weights: by the base's keys.
        files: further files of the folder, by name.

    Raises:
        AdapterError: if a weight is not finite; nothing is written then.
    """
    if odd := [key for key, weight in weights.items() if not weight.isfinite().all()]:
        raise AdapterError(f"not writing {out}: {odd[0]} is not finite")
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    with atomic_folder(Path(out)) as folder:
        write_model(folder, base, lambda key, old: weights.get(key, old).cpu().clone(), dtype=dtype)
        write_files(folder, files or {})


def write_model_notes(
    folder: Path, record: FusionRecord, sources: Sequence[str | Path], *, out: str, run: Path | None
) -> None:
    """Write beside a model how it was made, for programs and people, and how it is prompted if its inputs agree.

    Args:
        folder: to write into.
        record: for ``fusion.json``.
        sources: the folders that were merged.
        out: the name that the folder will have.
        run: the folder around it, if all sources lie there.
    """
    FUSION.write(folder, record)
    (folder / CARD_NAME).write_text(model_card(record, None, out=out, run=run), encoding="utf-8")
    write_files(folder, common_files(sources, (PROMPT_NAME, CHAT_TEMPLATE_NAME)))


class ChangedWeight(NamedTuple):
    """A weight with an update added, and the squared Frobenius norm of that update."""

    weight: Tensor
    square: float


def add_update(weight: Tensor, update: Updates, *, flipped: bool) -> ChangedWeight:
    """Add an update to a weight, block by block in float32 or higher; the result has the weight's dtype.

    Args:
        weight: of the base model; it is not written to.
        update: one, laid out ``(D, K)``.
        flipped: the weight is stored as ``(K, D)``.
    """
    result, start, square = weight.clone(), 0, 0.0
    rows = result.T if flipped else result
    for block_PK in _update_blocks(update):
        part = rows[start : start + len(block_PK)]
        part.copy_(part.to(block_PK.dtype) + block_PK)
        start += len(block_PK)
        square += float(block_PK.square().sum(dtype=torch.float64))
    return ChangedWeight(result, square)


def _update_blocks(update: Updates) -> Iterator[Tensor]:
    if isinstance(update, DenseUpdates):
        yield from (block[0] for block in update.blocks())
        return
    compute = torch.promote_types(update.B.dtype, torch.float32)
    a = update.A[0].to(compute)
    for part in update.B[0].split(_ROWS):
        yield part.to(compute) @ a


def _edit_configuration(folder: Path, dropped: set[str], change: Callable[[dict[str, Any]], object]) -> None:
    """Change the configuration of a copied model folder whose weights are not stored as they were."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    change(config)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if (index := folder / "model.safetensors.index.json").is_file():
        entries = json.loads(index.read_text(encoding="utf-8"))
        entries["weight_map"] = {key: file for key, file in entries["weight_map"].items() if key not in dropped}
        entries["metadata"] = {}  # it had the size of the files as they were; transformers wants the key
        index.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
