"""Merged updates added to a base model's weights, shard by shard.

Shape legend: ``D`` output features, ``K`` input features, ``P`` rows of one block.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from seedlora.adapter import AdapterError
from seedlora.atomic import atomic_folder
from seedlora.factors import LoRAFactors
from seedlora.fuse import RECORD_NAME, Fused, fusion_record, hash_inputs, read_adapters, stack_adapters, updates
from seedlora.hub import local_folder
from seedlora.merge import DenseUpdate, MergeRule, Update, bind
from seedlora.serving import shards

#: Rows of a factored update that are multiplied out at a time.
_ROWS = 1024
#: What a model folder holds besides weights; other files are left behind.
_COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.py")


def fuse_into_base(
    sources: Sequence[str | Path],
    base: str | Path,
    out: str | Path,
    *,
    method: str | MergeRule = "seedlora",
    options: Mapping[str, Any] | None = None,
    on_layer: Callable[[str], object] | None = None,
) -> Path:
    """Fuse adapters and write the base model with the result added to its weights.

    Holds the adapters, one shard of the base and one layer's update at a time. Dense results are added as they are,
    without compression, unless a ``rank`` is asked for. Sums are taken in float32 and stored in the base's dtype.

    Args:
        sources: adapter folders or hub ids, of one base model.
        base: the base model's folder, with safetensors files, or its hub id.
        out: the folder to write, whole or not at all.
        method: a name of :data:`seedlora.merge.METHODS`, or any rule.
        options: the method's keyword options.
        on_layer: called with each layer's path when it is done.

    Raises:
        ValueError: for an unknown method or option, a base that is quantised or lacks a layer; ``AdapterError`` for
            adapters that cannot be read or fused. Nothing is written then.
        OSError: if a file cannot be read or written.
    """
    bound = bind(method, options)
    base, out = local_folder(base, "model folder", ("*.safetensors", *_COPIED)), Path(out)
    if out.exists() and out.resolve() == base.resolve():
        raise ValueError(f"the output {out} is the base model itself; give another folder")
    files = _checked_base(base)
    adapters = read_adapters(sources)
    stacks = stack_adapters(adapters)
    first = next(iter(adapters.values()))
    keys = {file: _keys(file) for file in files}
    homes = _homes(stacks, keys)
    _check_shapes(stacks, homes, first.embeddings, transposed=first.fan_in_fan_out)
    order = sorted(stacks, key=lambda path: files.index(homes[path][0]))
    compression: dict[str, float] = {}

    def finished() -> Iterator[tuple[str, Update]]:
        for path, update in updates(stacks, bound, order=order):
            if bound.use.rank is None:
                yield path, update
            else:
                compressed = bound.finish(path, update)
                compression[path] = compressed.error
                yield path, compressed.factors

    with atomic_folder(out) as folder:
        walk = finished()
        pending = next(walk, None)
        for file in files:
            with safe_open(file, framework="pt") as handle:
                tensors = {key: handle.get_tensor(key) for key in keys[file]}
                metadata = handle.metadata()
            while pending is not None and homes[pending[0]][0] == file:
                path, update = pending
                key = homes[path][1]
                flipped = path in first.embeddings or first.fan_in_fan_out
                tensors[key] = _added(tensors[key], update, flipped=flipped)
                if on_layer is not None:
                    on_layer(path)
                pending = next(walk, None)
            save_file(tensors, folder / file.name, metadata=metadata)
            del tensors
        for pattern in _COPIED:
            for extra in base.glob(pattern):
                shutil.copy(extra, folder / extra.name)
        record = fusion_record(bound, Fused({}, compression), hash_inputs(sources), base_model=first.base_model)
        record["into_base"] = base.name
        (folder / RECORD_NAME).write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
    return out


def _checked_base(base: Path) -> list[Path]:
    files = shards(base)
    config = base / "config.json"
    if config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("quantization_config"):
        raise ValueError(f"base model {base} is quantised; dequantise it first, or keep the adapter apart")
    return files


def _keys(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as handle:
            return list(handle.keys())
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from None


def _homes(stacks: Mapping[str, LoRAFactors], keys: Mapping[Path, Sequence[str]]) -> dict[str, tuple[Path, str]]:
    """Shard and key of every layer's weight. A checkpoint may lack the first parts of a path, or have more of them."""
    file_of = {key: file for file, names in keys.items() for key in names}
    homes = {}
    for path in stacks:
        parts = f"{path}.weight".split(".")
        key = next((k for i in range(len(parts) - 2) if (k := ".".join(parts[i:])) in file_of), None)
        if key is None and f"{path}.weight" in file_of:
            key = f"{path}.weight"
        if key is None:
            longer = [k for k in file_of if k.endswith(f".{path}.weight")]
            if len(longer) != 1:
                raise AdapterError(
                    f"the base model has {'no' if not longer else 'more than one'} weight for the adapted layer {path} "
                    "(a tied head has no weight of its own: untie it, or keep the adapter apart)"
                )
            key = longer[0]
        homes[path] = (file_of[key], key)
    return homes


def _check_shapes(
    stacks: Mapping[str, LoRAFactors],
    homes: Mapping[str, tuple[Path, str]],
    embeddings: frozenset[str],
    *,
    transposed: bool,
) -> None:
    for path, stack in stacks.items():
        file, key = homes[path]
        with safe_open(file, framework="pt") as handle:
            found = tuple(handle.get_slice(key).get_shape())
        wanted = stack.shape[::-1] if path in embeddings or transposed else stack.shape
        if found != wanted:
            raise AdapterError(f"{file.name}: '{key}' has shape {found}, the adapters' update has {wanted}")


def _added(weight: Tensor, update: Update, *, flipped: bool) -> Tensor:
    """The weight plus the update, block by block in float32 or higher, in the weight's dtype."""
    result, start = weight.clone(), 0
    rows = result.T if flipped else result
    for block_PK in _blocks(update):
        part = rows[start : start + len(block_PK)]
        part.copy_(part.to(block_PK.dtype) + block_PK)
        start += len(block_PK)
    return result


def _blocks(update: Update) -> Iterator[Tensor]:
    if isinstance(update, DenseUpdate):
        yield from update.blocks()
        return
    compute = torch.promote_types(update.B.dtype, torch.float32)
    a = update.A[0].to(compute)
    for part in update.B[0].split(_ROWS):
        yield part.to(compute) @ a
