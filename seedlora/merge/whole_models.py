"""Whole models: merged updates added to a base model's weights, shard by shard, and models trained in full.

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

from seedlora.adapters.adapter import BASE_NAME, PROMPT_NAME, Adapter, AdapterError, is_model, locate
from seedlora.adapters.model_card import CARD_NAME, model_card
from seedlora.adapters.reading import quantization_of
from seedlora.merge.adapter_folders import check_output
from seedlora.merge.averages import average, averaged
from seedlora.merge.bound_rule import BoundRule, MergeRule
from seedlora.merge.inputs import read_adapters, stack_updates
from seedlora.merge.layers import Fused, updates
from seedlora.merge.record import (
    common_text,
    fusion_record,
    gain_record,
    hash_inputs,
    record_kinds,
    recorded,
    run_around,
)
from seedlora.merge.registry import METHODS, make_rule
from seedlora.model.weight_files import MODEL_FILES, WeightFiles
from seedlora.records.fusion import FUSION, FusionRecord
from seedlora.updates.algebra import gram
from seedlora.updates.dense import DenseUpdates, Updates, block_rows
from seedlora.utils.files import atomic_folder

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

    Holds the adapters, one shard of the base twice, as it was and as it becomes, and one layer's update at a time.
    Dense results, DoRA's among them, are added as they are, without compression, unless a ``rank`` is asked for. Sums
    are taken in float32 and stored in the base's dtype. A base that bitsandbytes stored in 4 or 8 bits is dequantised:
    nothing is ever added to quantised weights. Averaged ``modules_to_save`` take the place of the base's, averaged
    biases are added to it. Folders of whole models that were trained from this base are fused, too:
    :func:`fused_weights`.

    Args:
        sources: adapter folders or hub ids, or folders of whole models, of one base model.
        base: the base model's folder, with safetensors files, or its hub id.
        out: the folder to write, whole or not at all.
        method: a name of :data:`seedlora.merge.registry.METHODS`, or any rule.
        options: the method's keyword options.
        on_layer: called with each layer's path when it is done.

    Raises:
        ValueError: for an unknown method or option, a base that cannot be dequantised or lacks a layer, an ``out`` that
            is not to be replaced (:func:`seedlora.merge.adapter_folders.check_output`);
            ``AdapterError`` for adapters that cannot be read or fused. Nothing is written then.
        OSError: if a file cannot be read or written.
    """
    bound = make_rule(method, options)
    weights, out = WeightFiles(base), Path(out)
    check_output(out, sources, base)
    if sources and all(map(is_model, sources)):
        _fuse_models(sources, weights, out, bound, on_layer)
        return out
    for source in sources:
        if (kind := quantization_of(locate(source))) not in ("none", weights.bits):
            raise AdapterError(
                f"{source} belongs on the base model in {kind} alone, as its {BASE_NAME} says, and {base} is "
                f"{'not quantised' if weights.bits == 'none' else f'in {weights.bits}'}; give a folder of the base "
                f"that bitsandbytes stored in {kind}"
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
    place = {key: i for i, key in enumerate(homes)}
    order = sorted(stacks, key=lambda path: place[keys[path]])
    compression, inputs = dict[str, float](), dict[str, float]()
    svd, gains = dict[str, str](), list[float]()

    def finished() -> Iterator[tuple[str, Updates]]:
        for path, update in updates(stacks, bound, order=order, inputs=inputs):
            if bound.use.rank is None:
                yield path, update
            else:
                compressed = bound.finish(path, update)
                compression[path], svd[path] = compressed.error, compressed.svd
                yield path, compressed.factors

    walk, paths = finished(), {key: path for path, key in keys.items()}
    bias_paths, module_names = ({key: name for name, key in places.items()} for places in (bias_keys, module_keys))

    def change(key: str, weight: Tensor) -> Tensor:
        if key in paths:
            path, update = next(walk)
            assert path == paths[key]
            weight, square = _added(weight, update, flipped=first.flipped(path))
            mean = float(gram(stacks[path]).mean()) if len(adapters) > 1 else 0.0
            gains.append((square / mean) ** 0.5 if mean > 0 else 1.0)
            if on_layer is not None:
                on_layer(path)
        weight = weights.restored(key, weight)
        if key in bias_paths:
            weight = (weight.float() + biases[bias_paths[key]].float()).to(weight.dtype)
        return modules[module_names[key]].to(weight.dtype) if key in module_names else weight

    with atomic_folder(out) as folder:
        write_model(folder, weights, change)
        fused = Fused({}, compression, inputs, svd=svd)
        run = run_around(out, sources)
        record = fusion_record(bound, fused, hash_inputs(sources), base_model=first.base_model, run=run)
        if len(adapters) > 1:
            record["gain"] = gain_record(gains)
        record_kinds(record, adapters)
        record["into_base"] = recorded(base, run)
        if weights.quantization is not None:
            record["dequantised"] = weights.quantization
        _tell(folder, record, sources, run)
    return out


def write_model(
    folder: Path, base: WeightFiles, change: Callable[[str, Tensor], Tensor], *, dtype: str | None = None
) -> None:
    """Write a base model with other weights into a folder, a shard at a time, its configuration and tokenizer too.

    Of a shard, what was read of the old one and all of the new one are held until it is written: twice its size.

    Args:
        folder: that exists and is empty.
        base: the model; what is quantised comes out dequantised.
        change: what to write for a key and the tensor that the base has there, called in the order of ``base.files``.
        dtype: of the new weights, for the configuration. Default: that of the base.
    """
    statistics = {name for key in base.files if key.endswith(".weight") for name in base.statistics(key)}
    for file in dict.fromkeys(base.files.values()):
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata()
        here = [key for key, home in base.files.items() if home == file and key not in statistics]
        tensors = {key: change(key, base.weight(key)) for key in here}
        save_file(tensors, folder / file.name, metadata=metadata)
        del tensors
        base.close(file)
    for pattern in MODEL_FILES:
        for extra in base.folder.glob(pattern):
            shutil.copy(extra, folder / extra.name)
    if base.quantization is not None:
        _describe(folder, statistics, lambda config: config.pop("quantization_config"))
    if dtype is not None:
        _describe(folder, statistics, lambda config: config.update(dtype=dtype) or config.pop("torch_dtype", None))


def write_trained(
    out: str | Path, base: WeightFiles, weights: Mapping[str, Tensor], *, files: Mapping[str, str] | None = None
) -> None:
    """Write a model that was trained in full, in the dtype of its weights, whole or not at all.

    Args:
        out: the folder; an older one is replaced.
        base: what it was trained from: its other tensors, configuration and tokenizer go with it.
        weights: by the base's keys.
        files: further text files of the folder, by name.

    Raises:
        AdapterError: if a weight is not finite; nothing is written then.
    """
    if odd := [key for key, weight in weights.items() if not weight.isfinite().all()]:
        raise AdapterError(f"not writing {out}: {odd[0]} is not finite")
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    with atomic_folder(Path(out)) as folder:
        write_model(folder, base, lambda key, old: weights.get(key, old).cpu().clone(), dtype=dtype)
        for name, text in (files or {}).items():
            (folder / name).write_text(text, encoding="utf-8")


def fused_weights(
    models: Sequence[WeightFiles],
    base: WeightFiles,
    rule: MergeRule | BoundRule,
    *,
    on_layer: Callable[[str], object] | None = None,
) -> Callable[[str, Tensor], Tensor]:
    r"""What :func:`write_model` makes of a base model and models that were trained from it in full.

    .. math:: W = W_0 + \mathrm{rule}(W_1 - W_0, \ldots, W_N - W_0)

    for every matrix, in row blocks read from the files; vectors (norms, biases) are averaged. Sums are taken in float32
    and stored in the base's dtype.

    Args:
        models: with the base's keys and shapes.
        base: what they were trained from.
        rule: one that takes dense updates.
        on_layer: called with each matrix's path when it is done.

    Raises:
        ValueError: for a rule that needs factors, or a model of other keys or shapes.
    """
    bound = make_rule(rule)
    check_dense(bound)
    stacks = {}
    for key in base.files:
        for model in models:
            if key not in model.files or model.shape(key) != base.shape(key):
                found = f"in shape {model.shape(key)}" if key in model.files else "not at all"
                raise ValueError(
                    f"{model.source} has '{key}' {found}, the base model {base.source} in {base.shape(key)}; give the "
                    "model that it was trained from"
                )
        if len(base.shape(key)) == 2:
            stacks[key.removesuffix(".weight")] = _differences(models, base, key)
    walk = updates(stacks, bound)

    def change(key: str, weight: Tensor) -> Tensor:
        if weight.ndim == 2:
            path, update = next(walk)
            assert path == key.removesuffix(".weight")
            weight, _ = _added(weight, update, flipped=False)
            for model in models:
                model.close(model.files[key])
            if on_layer is not None:
                on_layer(path)
            return weight
        if not weight.is_floating_point():
            return weight
        each = [model.tensor(key).float() for model in models]
        return averaged({key: each}, bound)[key].to(weight.dtype)

    return change


def check_dense(rule: BoundRule) -> None:
    """Raise ValueError if a rule cannot fuse models that were trained in full."""
    if not rule.method.dense:
        able = ", ".join(name for name, method in METHODS.items() if method.dense)
        raise ValueError(
            f"Merge method '{rule.name}' works on the factors of adapters, and weights trained in full have none; "
            f"choose one of {able}"
        )
    if rule.use.rank is not None:
        raise ValueError(f"rank {rule.use.rank} is for adapters; weights trained in full are fused at their full rank")


def _differences(models: Sequence[WeightFiles], base: WeightFiles, key: str) -> DenseUpdates:
    """What training added to a matrix, all models together, by row blocks."""
    (d, k), n = base.shape(key), len(models)
    step = block_rows(n, k)

    def blocks() -> Iterator[Tensor]:
        before, after = base.rows_of(key), [model.rows_of(key) for model in models]
        for start in range(0, d, step):
            w_PK = before(start, start + step).float()
            yield torch.stack([rows(start, start + step).float() - w_PK for rows in after])

    return DenseUpdates((d, k), min(d, k), torch.float32, torch.device("cpu"), blocks, n)


def _fuse_models(
    sources: Sequence[str | Path],
    base: WeightFiles,
    out: Path,
    bound: BoundRule,
    on_layer: Callable[[str], object] | None,
) -> None:
    """Fuse models that were trained in full from a base model; ``out`` is written whole or not at all."""
    models = [WeightFiles(source) for source in sources]
    change = fused_weights(models, base, bound, on_layer=on_layer)
    hashes = hash_inputs(sources)
    with atomic_folder(out) as folder:
        write_model(folder, base, change)
        run = run_around(out, sources)
        record = fusion_record(bound, None, hashes, base_model=str(base.source), run=run)
        vectors = [key for key in base.files if len(base.shape(key)) == 1]
        record["kinds"] = ["whole models"]
        record["averaged"] = sorted({key.split(".")[-2] for key in vectors if "." in key})
        record["into_base"] = recorded(base.source, run)
        _tell(folder, record, sources, run)


def _tell(folder: Path, record: FusionRecord, sources: Sequence[str | Path], run: Path | None) -> None:
    """Put beside a model how it was made, for programs and people, and how it is prompted if its inputs agree."""
    FUSION.write(folder, record)
    (folder / CARD_NAME).write_text(model_card(record, None, run=run), encoding="utf-8")
    if prompt := common_text(sources, PROMPT_NAME):
        (folder / PROMPT_NAME).write_text(prompt, encoding="utf-8")


def _check_shapes(adapter: Adapter, keys: Mapping[str, str], weights: WeightFiles) -> None:
    for path, key in keys.items():
        found, shape = weights.shape(key), adapter.layers[path].shape
        wanted = shape[::-1] if adapter.flipped(path) else shape
        if found != wanted:
            raise AdapterError(
                f"{weights.files[key].name}: '{key}' has shape {found}, the adapters' update has {wanted}"
            )


def _places(adapter: Adapter, keys: Mapping[str, str], weights: WeightFiles) -> tuple[dict[str, str], dict[str, str]]:
    """Where averaged biases and full weights go: their keys in the base, by layer path and by key of the adapter."""
    biases = {path: keys[path].removesuffix("weight") + "bias" for path in adapter.biases}
    if missing := [path for path, key in biases.items() if key not in weights.files]:
        raise AdapterError(
            f"lora_bias adds a vector to {missing[0]}, which has no bias in the base model {weights.source}; leave "
            "--into-base out to keep it in an adapter"
        )
    modules = {}
    for name, tensor in adapter.modules.items():
        try:
            path, _, parameter = name.rpartition(".")
            key = weights.key(path, parameter)
        except ValueError:
            # A tied head has no weight of its own, and none is lost if it was trained with the embedding as one.
            if any(torch.equal(tensor, other) for twin, other in adapter.modules.items() if twin != name):
                continue
            raise
        if weights.shape(key) != tuple(tensor.shape):
            raise AdapterError(
                f"modules_to_save holds {name} of shape {tuple(tensor.shape)}, which the base model {weights.source} "
                "has in another shape: was its vocabulary resized?"
            )
        modules[name] = key
    return biases, modules


def _check_tied(
    keys: Mapping[str, str], modules: Mapping[str, Tensor], module_keys: Mapping[str, str], weights: WeightFiles
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


def _describe(folder: Path, statistics: set[str], change: Callable[[dict[str, Any]], object]) -> None:
    """Change the configuration of a copied model folder whose weights are not stored as they were."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    change(config)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if (index := folder / "model.safetensors.index.json").is_file():
        entries = json.loads(index.read_text(encoding="utf-8"))
        entries["weight_map"] = {key: file for key, file in entries["weight_map"].items() if key not in statistics}
        entries["metadata"] = {}  # it had the size of the files as they were; transformers wants the key
        index.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def _added(weight: Tensor, update: Updates, *, flipped: bool) -> tuple[Tensor, float]:
    """The weight plus the update, block by block in float32 or higher, in the weight's dtype; the update's |.|^2."""
    result, start, square = weight.clone(), 0, 0.0
    rows = result.T if flipped else result
    for block_PK in _blocks(update):
        part = rows[start : start + len(block_PK)]
        part.copy_(part.to(block_PK.dtype) + block_PK)
        start += len(block_PK)
        square += float(block_PK.square().sum(dtype=torch.float64))
    return result, square


def _blocks(update: Updates) -> Iterator[Tensor]:
    if isinstance(update, DenseUpdates):
        yield from (block[0] for block in update.blocks())
        return
    compute = torch.promote_types(update.B.dtype, torch.float32)
    a = update.A[0].to(compute)
    for part in update.B[0].split(_ROWS):
        yield part.to(compute) @ a
