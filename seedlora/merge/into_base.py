"""Merge adapters into the weights of their base model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seedlora.adapters.adapter import BASE_NAME, Adapter, AdapterError, is_model, locate, quantization_of
from seedlora.adapters.peft_config import PEFT_AUTO_CLASSES
from seedlora.merge.adapter_folders import check_output
from seedlora.merge.averages import average_biases_and_modules
from seedlora.merge.bound_rule import BoundRule, MergeRule
from seedlora.merge.inputs import read_adapters, stack_updates
from seedlora.merge.layers import Fused, merged_updates
from seedlora.merge.model_folders import add_update, write_model, write_model_notes
from seedlora.merge.record import fusion_record, gain_record, hash_inputs, record_kinds, recorded, run_around
from seedlora.merge.registry import make_rule
from seedlora.merge.whole_models import merge_models
from seedlora.model.weight_files import WeightFiles
from seedlora.updates.algebra import gram, is_nothing
from seedlora.updates.dense import Updates
from seedlora.utils.files import atomic_folder


def merge_into_base(
    sources: Sequence[str | Path],
    base: str | Path,
    out: str | Path,
    *,
    method: str | MergeRule = "seedlora",
    options: Mapping[str, Any] | None = None,
    on_layer: Callable[[str], object] | None = None,
) -> Path:
    """Merge adapters and write the base model with the result added to its weights.

    Holds the adapters, one shard of the base twice, as it was and as it becomes, and one layer's update at a time.
    Dense results, DoRA's among them, are added as they are, without compression, unless a ``rank`` is asked for. Sums
    are taken in float32 and stored in the base's dtype. A base that bitsandbytes stored in 4 or 8 bits is dequantised:
    nothing is ever added to quantised weights. Averaged ``modules_to_save`` take the place of the base's, averaged
    biases are added to it. Folders of whole models that were trained from this base are merged, too:
    :func:`seedlora.merge.whole_models.make_weight_merger`.

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
        merge_models(sources, weights, out, bound, on_layer)
        return out
    _check_quantization(sources, base, weights)
    # Before the adapters are read, so that a base model that cannot be used is refused at once.
    places = {key: i for i, key in enumerate(weights.files)}
    adapters = read_adapters(sources, base=weights, on_layer=on_layer)
    change = _AdaptersIntoBase(adapters, weights, bound, places, on_layer)
    with atomic_folder(out) as folder:
        write_model(folder, weights, change)
        fused = Fused({}, compression=change.compression, inputs=change.inputs, svd=change.svd)
        run = run_around(out, sources)
        first = next(iter(adapters.values()))
        record = fusion_record(bound, fused, hash_inputs(sources), base_model=first.base_model, run=run)
        if len(adapters) > 1:
            record["gain"] = gain_record(change.gains)
        record_kinds(record, adapters)
        record["into_base"] = recorded(base, run)
        if change.changes_nothing:
            record["changes_nothing"] = True
        if weights.quantization is not None:
            record["dequantised"] = weights.quantization
        write_model_notes(folder, record, sources, out=out.name, run=run)
    return out


def _check_quantization(sources: Sequence[str | Path], base: str | Path, weights: WeightFiles) -> None:
    """Refuse adapters that belong on a quantised base model, unless the base is stored so."""
    for source in sources:
        if (kind := quantization_of(locate(source))) not in ("none", weights.stored_as):
            stored = "not quantised" if weights.stored_as == "none" else f"in {weights.stored_as}"
            raise AdapterError(
                f"{source} belongs on the base model in {kind} alone, as its {BASE_NAME} says, and {base} is {stored}; "
                f"give a folder of the base that bitsandbytes stored in {kind}"
            )


class _AdaptersIntoBase:
    """Changes a base model's tensors, one by one in the order of its files, by the merge of adapters.

    The merged updates are computed as their weights come, so that one is held at a time.

    Args:
        adapters: by name.
        weights: of their base model.
        bound: the rule.
        places: of the base model's keys, in the order in which they will come.
        on_layer: called with each layer's path when it is done.

    Attributes:
        compression: relative Frobenius error of each layer that was compressed to the rank asked for.
        svd: which SVD each of these got.
        inputs: the largest relative error of updates that were compressed for the rule, by layer.
        gains: of each layer, how much longer its merged update is than the mean update.
        changes_nothing: whether all merged updates were zero so far, and nothing else is changed.

    Raises:
        AdapterError: if the base model has not the layers, shapes or biases that the adapters are for.
    """

    def __init__(
        self,
        adapters: Mapping[str, Adapter],
        weights: WeightFiles,
        bound: BoundRule,
        places: Mapping[str, int],
        on_layer: Callable[[str], object] | None,
    ) -> None:
        self.weights, self.bound, self.on_layer = weights, bound, on_layer
        self.stacks = stack_updates(adapters, weights)
        self.adapter, self.count = next(iter(adapters.values())), len(adapters)
        keys = {path: weights.key(path) for path in self.stacks}
        _check_shapes(self.adapter, keys, weights)
        averages = average_biases_and_modules(adapters, bound, rounded=False)
        targets = _target_keys(self.adapter, keys, weights)
        _check_tied(keys, averages.modules, targets.modules, weights)
        self.paths = {key: path for path, key in keys.items()}
        self.biases = {key: averages.biases[path] for path, key in targets.biases.items()}
        self.modules = {key: averages.modules[name] for name, key in targets.modules.items()}
        self.compression, self.svd = dict[str, float](), dict[str, str]()
        self.inputs, self.gains = dict[str, float](), list[float]()
        self.changes_nothing = not averages.change_anything
        self._updates = self._finished_updates(sorted(self.stacks, key=lambda path: places[keys[path]]))

    def _finished_updates(self, order: Sequence[str]) -> Iterator[tuple[str, Updates]]:
        """Give the merged update of each layer, compressed if the rule asks for a rank."""
        for path, update in merged_updates(self.stacks, self.bound, order=order, inputs=self.inputs):
            if self.bound.common.rank is None:
                yield path, update
            else:
                compressed = self.bound.finish(path, update)
                self.compression[path], self.svd[path] = compressed.error, compressed.svd
                yield path, compressed.factors

    def __call__(self, key: str, weight: Tensor) -> Tensor:
        """Return what is written for a key in the place of the base model's tensor."""
        if key in self.paths:
            weight = self._with_update(key, weight)
        weight = self.weights.in_original_dtype(key, weight)
        if key in self.biases:
            weight = (weight.float() + self.biases[key].float()).to(weight.dtype)
        return self.modules[key].to(weight.dtype) if key in self.modules else weight

    def _with_update(self, key: str, weight: Tensor) -> Tensor:
        """Add the next merged update, which is that of this key, and note its gain."""
        path, update = next(self._updates)
        assert path == self.paths[key]
        changed = add_update(weight, update, flipped=self.adapter.flipped(path))
        self.changes_nothing = self.changes_nothing and is_nothing(update)
        mean = float(gram(self.stacks[path]).mean()) if self.count > 1 else 0.0
        self.gains.append((changed.square / mean) ** 0.5 if mean > 0 else 1.0)
        if self.on_layer is not None:
            self.on_layer(path)
        return changed.weight


def _check_shapes(adapter: Adapter, keys: Mapping[str, str], weights: WeightFiles) -> None:
    for path, key in keys.items():
        found, shape = weights.shape(key), adapter.layers[path].shape
        wanted = shape[::-1] if adapter.flipped(path) else shape
        if found != wanted:
            raise AdapterError(
                f"{weights.files[key].name}: '{key}' has shape {found}, the adapters' update has {wanted}"
            )


class _TargetKeys(NamedTuple):
    """The base model's keys of averaged biases, by layer path, and of full weights, by key of the adapter."""

    biases: dict[str, str]
    modules: dict[str, str]


def _target_keys(adapter: Adapter, keys: Mapping[str, str], weights: WeightFiles) -> _TargetKeys:
    """Find the tensors of the base model that averaged biases are added to, and whose place full weights take.

    Args:
        adapter: one of those that are merged.
        keys: of the adapted layers' weights, by layer path.
        weights: of the base model.

    Raises:
        AdapterError: if the base model has no such bias, or a full weight is of another shape.
    """
    biases = {path: keys[path].removesuffix("weight") + "bias" for path in adapter.biases}
    if missing := [path for path, key in biases.items() if key not in weights.files]:
        raise AdapterError(
            f"lora_bias adds a vector to {missing[0]}, which has no bias in the base model {weights.source}; leave "
            "--into_base out to keep it in an adapter"
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
            if adapter.task_type not in (None, "CAUSAL_LM"):
                raise AdapterError(_lacks_head(name, adapter, weights)) from None
            raise
        if weights.shape(key) != tuple(tensor.shape):
            raise AdapterError(
                f"modules_to_save holds {name} of shape {tuple(tensor.shape)}, which the base model {weights.source} "
                "has in another shape: was its vocabulary resized?"
            )
        modules[name] = key
    return _TargetKeys(biases, modules)


def _lacks_head(name: str, adapter: Adapter, weights: WeightFiles) -> str:
    """Say that a base model has no head for the task of an adapter, and what to do."""
    task = str(adapter.task_type)
    return (
        f"the adapters are for {task} and hold its head, {name}, which the base model {weights.source} has not; leave "
        f"--into_base out and load the result by {PEFT_AUTO_CLASSES[task]}, or give a base model with that head"
    )


def _check_tied(
    keys: Mapping[str, str], modules: Mapping[str, Tensor], module_keys: Mapping[str, str], weights: WeightFiles
) -> None:
    """Check that what was trained as an embedding or a head does not become both."""
    alone = {
        name: key
        for name, key in module_keys.items()  # a head that was trained as one with the embedding is its equal
        if not any(torch.equal(modules[name], other) for twin, other in modules.items() if twin != name)
    }
    changed = [name for name, key in {**keys, **alone}.items() if weights.shape(key)[0] == weights.vocabulary_size]
    if changed and weights.ties_head:
        raise AdapterError(
            f"the head of the base model {weights.source} is its input embedding (tie_word_embeddings), so what is "
            f"added to {changed[0]} would change both; leave --into_base out, or give a base model that stores both "
            "and has tie_word_embeddings: false"
        )
