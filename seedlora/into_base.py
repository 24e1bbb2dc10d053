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
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from seedlora.adapter import BASE_NAME, Adapter, AdapterError, locate
from seedlora.atomic import atomic_folder
from seedlora.base_weights import MODEL_FILES, BaseWeights
from seedlora.fuse import (
    RECORD_NAME,
    Fused,
    average,
    check_output,
    describe_inputs,
    fusion_record,
    hash_inputs,
    read_adapters,
    recorded,
    run_around,
    stack_updates,
    updates,
)
from seedlora.merge import DenseUpdates, MergeRule, Updates, bind

#: Rows of a factored update that are multiplied out at a time.
_ROWS = 1024


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

    Holds the adapters, one shard of the base and one layer's update at a time. Dense results, DoRA's among them, are
    added as they are, without compression, unless a ``rank`` is asked for. Sums are taken in float32 and stored in the
    base's dtype. A base that bitsandbytes stored in 4 or 8 bits is dequantised: nothing is ever added to quantised
    weights. Averaged ``modules_to_save`` take the place of the base's, averaged biases are added to it.

    Args:
        sources: adapter folders or hub ids, of one base model.
        base: the base model's folder, with safetensors files, or its hub id.
        out: the folder to write, whole or not at all.
        method: a name of :data:`seedlora.merge.METHODS`, or any rule.
        options: the method's keyword options.
        on_layer: called with each layer's path when it is done.

    Raises:
        ValueError: for an unknown method or option, a base that cannot be dequantised or lacks a layer, an ``out`` that
            is not to be replaced (:func:`seedlora.fuse.check_output`);
            ``AdapterError`` for adapters that cannot be read or fused. Nothing is written then.
        OSError: if a file cannot be read or written.
    """
    bound = bind(method, options)
    weights, out = BaseWeights(base), Path(out)
    check_output(out, sources, base)
    if weights.quantization is None and (bound_to := [s for s in sources if (locate(s) / BASE_NAME).is_file()]):
        raise AdapterError(
            f"{bound_to[0]} belongs on the base model in 4 bits alone, as its {BASE_NAME} says, and {base} is not "
            "quantised; give a folder of the base that bitsandbytes stored in 4 bits"
        )
    homes: Mapping[str, Path] = weights.files
    adapters = read_adapters(sources, base=weights, on_layer=on_layer)
    stacks = stack_updates(adapters, weights)
    first = next(iter(adapters.values()))
    keys = {path: weights.key(path) for path in stacks}
    _check_shapes(first, keys, weights)
    biases, modules = average(adapters, bound)
    bias_keys, module_keys = _places(first, keys, weights)
    _check_tied(keys, modules, module_keys, weights)
    files = list(dict.fromkeys(homes.values()))
    order = sorted(stacks, key=lambda path: files.index(homes[keys[path]]))
    compression, inputs = dict[str, float](), dict[str, float]()

    def finished() -> Iterator[tuple[str, Updates]]:
        for path, update in updates(stacks, bound, order=order, inputs=inputs):
            if bound.use.rank is None:
                yield path, update
            else:
                compressed = bound.finish(path, update)
                compression[path] = compressed.error
                yield path, compressed.factors

    statistics = {name for key in homes if key.endswith(".weight") for name in weights.statistics(key)}
    with atomic_folder(out) as folder:
        walk = finished()
        pending = next(walk, None)
        for file in files:
            with safe_open(file, framework="pt") as handle:
                metadata = handle.metadata()
            here = [key for key, home in homes.items() if home == file and key not in statistics]
            tensors = {}
            while pending is not None and homes[keys[pending[0]]] == file:
                path, update = pending
                key = keys[path]
                tensors[key] = weights.restored(key, _added(weights.weight(key), update, flipped=first.flipped(path)))
                if on_layer is not None:
                    on_layer(path)
                pending = next(walk, None)
            tensors |= {key: weights.restored(key, weights.weight(key)) for key in here if key not in tensors}
            for path, key in bias_keys.items():
                if key in tensors:
                    tensors[key] = (tensors[key].float() + biases[path].float()).to(tensors[key].dtype)
            for name, key in module_keys.items():
                if key in tensors:
                    tensors[key] = modules[name].to(tensors[key].dtype)
            save_file(tensors, folder / file.name, metadata=metadata)
            del tensors
            weights.close(file)
        for pattern in MODEL_FILES:
            for extra in weights.folder.glob(pattern):
                shutil.copy(extra, folder / extra.name)
        fused = Fused({}, compression, inputs)
        run = run_around(out, sources)
        record = fusion_record(bound, fused, hash_inputs(sources), base_model=first.base_model, run=run)
        record |= describe_inputs(adapters)
        record["into_base"] = recorded(base, run)
        if weights.quantization is not None:
            record["dequantised"] = weights.quantization
            _forget_quantization(folder, statistics)
        (folder / RECORD_NAME).write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
    return out


def _check_shapes(adapter: Adapter, keys: Mapping[str, str], weights: BaseWeights) -> None:
    for path, key in keys.items():
        found, shape = weights.shape(key), adapter.layers[path].shape
        wanted = shape[::-1] if adapter.flipped(path) else shape
        if found != wanted:
            raise AdapterError(
                f"{weights.files[key].name}: '{key}' has shape {found}, the adapters' update has {wanted}"
            )


def _places(adapter: Adapter, keys: Mapping[str, str], weights: BaseWeights) -> tuple[dict[str, str], dict[str, str]]:
    """Where averaged biases and full weights go: their keys in the base, by layer path and by key of the adapter."""
    biases = {path: keys[path].removesuffix("weight") + "bias" for path in adapter.biases}
    if missing := [path for path, key in biases.items() if key not in weights.files]:
        raise AdapterError(
            f"lora_bias adds a vector to {missing[0]}, which has no bias in the base model {weights.source}; leave "
            "--into-base out to keep it in an adapter"
        )
    modules = {}
    for name, tensor in adapter.modules.items():
        key = weights.key(name.removesuffix(".weight")) if name.endswith(".weight") else name
        if key not in weights.files or weights.shape(key) != tuple(tensor.shape):
            raise AdapterError(
                f"modules_to_save holds {name} of shape {tuple(tensor.shape)}, which the base model {weights.source} "
                f"{'has in another shape' if key in weights.files else 'lacks'}: was its vocabulary resized?"
            )
        modules[name] = key
    return biases, modules


def _check_tied(
    keys: Mapping[str, str], modules: Mapping[str, Tensor], module_keys: Mapping[str, str], weights: BaseWeights
) -> None:
    """See that what was trained as an embedding or a head does not become both."""
    alone = {
        name: key
        for name, key in module_keys.items()  # a head that was trained as one with the embedding is its equal
        if not any(torch.equal(modules[name], other) for twin, other in modules.items() if twin != name)
    }
    changed = [name for name, key in {**keys, **alone}.items() if weights.shape(key)[0] == weights.vocabulary]
    if changed and weights.tied:
        raise AdapterError(
            f"the head of the base model {weights.source} is its input embedding (tie_word_embeddings), so what is "
            f"added to {changed[0]} would change both; leave --into-base out, or give a base model that stores both "
            "and has tie_word_embeddings: false"
        )


def _forget_quantization(folder: Path, statistics: set[str]) -> None:
    """Take what describes the quantised weights out of a copied model folder."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if (index := folder / "model.safetensors.index.json").is_file():
        entries = json.loads(index.read_text(encoding="utf-8"))
        entries["weight_map"] = {key: file for key, file in entries["weight_map"].items() if key not in statistics}
        entries["metadata"] = {}  # it had the size of the quantised files; transformers wants the key
        index.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def _added(weight: Tensor, update: Updates, *, flipped: bool) -> Tensor:
    """The weight plus the update, block by block in float32 or higher, in the weight's dtype."""
    result, start = weight.clone(), 0
    rows = result.T if flipped else result
    for block_PK in _blocks(update):
        part = rows[start : start + len(block_PK)]
        part.copy_(part.to(block_PK.dtype) + block_PK)
        start += len(block_PK)
    return result


def _blocks(update: Updates) -> Iterator[Tensor]:
    if isinstance(update, DenseUpdates):
        yield from (block[0] for block in update.blocks())
        return
    compute = torch.promote_types(update.B.dtype, torch.float32)
    a = update.A[0].to(compute)
    for part in update.B[0].split(_ROWS):
        yield part.to(compute) @ a
