"""Adapters in, adapter out: the merge rule applied layer by layer, and the folder that servers load.

The only place where the layers of a model are walked.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from seedlora.adapter import (
    BASE_NAME,
    PROMPT_NAME,
    WEIGHTS_NAME,
    Adapter,
    AdapterError,
    base_model_of,
    files_sha256,
    is_model,
    locate,
    read_adapter,
    universal_config,
    without_start,
    write_adapter,
)
from seedlora.base_weights import BaseWeights, shards
from seedlora.card import CARD_NAME, model_card
from seedlora.dora import dora_updates
from seedlora.factors import LoRAFactors
from seedlora.merge import BoundRule, Compressed, MergeRule, Updates, bind, factored, gain
from seedlora.serving import base_shapes, complete

RECORD_NAME = "fusion.json"
#: Layers that are fused at a time, at most: each holds some copies of its factors.
_LAYERS_AT_A_TIME = 4


_Form = TypeVar("_Form", bound=Updates)


class Stacks(dict[str, _Form]):
    """The updates of ``N`` adapters by layer path; beside them, their full weights.

    Attributes:
        modules: by key within the model, one tensor of each adapter; empty unless modules are trained in full.
    """

    def __init__(self, layers: Mapping[str, _Form], modules: Mapping[str, Sequence[Tensor]] | None = None) -> None:
        super().__init__(layers)
        self.modules = dict(modules or {})


def full_weights(layers: Mapping[str, Any]) -> Mapping[str, Sequence[Tensor]]:
    """The full weights that are beside these updates, if there are any."""
    return layers.modules if isinstance(layers, Stacks) else {}


def joined(first: Stacks[LoRAFactors], second: Stacks[LoRAFactors]) -> Stacks[LoRAFactors]:
    """The adapters of one stack and then those of another, of the same layers, on the device of the second."""
    return Stacks(
        {path: LoRAFactors.stack([first[path].to(factors.device), factors]) for path, factors in second.items()},
        {key: [*(t.to(each[0].device) for t in first.modules[key]), *each] for key, each in second.modules.items()},
    )


class Fused(Stacks[LoRAFactors]):
    """One adapter per layer path, and averaged full weights.

    Attributes:
        compression: relative Frobenius error of each layer that was compressed to a rank; empty if all are exact.
        svd: which SVD each of these got, ``exact`` or ``randomized``.
        inputs: the same of updates of full rank that were compressed before the rule, because it works on factors: the
            largest of a layer's adapters.
    """

    def __init__(
        self,
        layers: Mapping[str, LoRAFactors],
        compression: Mapping[str, float],
        inputs: Mapping[str, float] | None = None,
        modules: Mapping[str, Sequence[Tensor]] | None = None,
        svd: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(layers, modules)
        self.compression, self.svd = dict(compression), dict(svd or {})
        self.inputs = dict(inputs or {})


def updates(
    stacks: Mapping[str, Updates],
    rule: MergeRule | BoundRule,
    *,
    order: Iterable[str] | None = None,
    inputs: dict[str, float] | None = None,
) -> Iterator[tuple[str, Updates]]:
    """Walk the layers of a model and apply a rule to each: a rule that looks at all layers first does so here.

    Args:
        stacks: the adapters of every layer by path.
        rule: a rule, or one with options as :func:`seedlora.merge.bind` gives it. One that needs factors gets updates
            of full rank compressed, each to the rule's ``rank``, by default ``N*R``.
        order: paths in the order in which they are wanted. Default: that of ``stacks``.
        inputs: filled with the error of what was compressed for the rule, by path.

    Raises:
        ValueError: if the rule's ``layers`` selects none.
    """
    merged = _merged(stacks, bind(rule), {} if inputs is None else inputs)
    for path in order if order is not None else stacks:
        yield path, merged(path)


def _merged(stacks: Mapping[str, Updates], bound: BoundRule, inputs: dict[str, float]) -> Callable[[str], Updates]:
    """Look at all layers, if the rule has to; what is left is a function of one path, as :func:`updates` applies it."""
    chosen = [path for path in stacks if bound.selects(path)]
    if stacks and not chosen:
        raise ValueError(f"layers={bound.use.layers!r} selects none of {len(stacks)} layers, e.g. {next(iter(stacks))}")
    made: dict[str, LoRAFactors] = {}

    def taken(path: str) -> Updates:
        stack = stacks[path]
        if isinstance(stack, LoRAFactors) or bound.method.dense:
            return stack
        if path not in made:
            made[path], error = factored(stack, bound.use.rank or len(stack) * stack.rank, seed=bound.use.seed)
            inputs[path] = error
        return made[path]

    facts = bound.survey(lambda: ((path, taken(path)) for path in chosen)) if chosen else {}

    def merged(path: str) -> Updates:
        return bound.update(path, taken(path), facts) if bound.selects(path) else bound.left_out(stacks[path])

    return merged


@contextmanager
def layer_threads() -> Iterator[Callable[..., Iterator[Any]]]:
    """A ``map`` over layers that is done by several threads of one core each, for CPU tensors.

    Matrices of a layer are too small to be worth dividing among cores. The results come in order, with the bits of the
    plain ``map`` on one core.
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(min(threads, _LAYERS_AT_A_TIME), "layers", torch.set_num_threads, (1,))
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # threads that start from now on take what was said last, by any thread


def fuse(
    stacks: Mapping[str, Updates],
    rule: MergeRule | BoundRule,
    *,
    on_layer: Callable[[str], object] | None = None,
    each: Callable[..., Iterator[Any]] = map,
) -> Fused:
    """Apply a merge rule to the stack of every layer; ranks are padded with zeros to the largest, as servers need.

    Args:
        stacks: the adapters of every layer by path.
        rule: a rule, or one with options as :func:`seedlora.merge.bind` gives it. Dense results are compressed to its
            ``rank``, by default ``N*R`` (one more where the rule adds a constant); the result says with which error.
        on_layer: called with each layer's path when it is done.
        each: how to go through the layers, as :func:`layer_threads` gives it. What may be dense, and as large as the
            layer, is done one after the other all the same.
    """
    bound = bind(rule)
    dense = [stack for stack in stacks.values() if not isinstance(stack, LoRAFactors)]
    if dense and bound.use.rank is None and not bound.method.dense:
        bound = replace(bound, use=replace(bound.use, rank=max(len(stack) * stack.rank for stack in dense)))
    fused, compression, svd, inputs = {}, {}, {}, dict[str, float]()
    merged = _merged(stacks, bound, inputs)

    def finished(path: str) -> tuple[Compressed, bool]:
        update = merged(path)
        compressed = bound.finish(path, update)
        return compressed, compressed.factors is not update

    walk = map(finished, stacks) if dense or bound.method.elementwise else each(finished, stacks)
    for path, (compressed, changed) in zip(stacks, walk, strict=True):
        fused[path] = compressed.factors
        if changed:
            compression[path], svd[path] = compressed.error, compressed.svd
        if on_layer is not None:
            on_layer(path)
    rank = max((factors.rank for factors in fused.values()), default=0)
    modules = {key: [mean] for key, mean in averaged(full_weights(stacks), bound).items()}
    return Fused({path: factors.padded(rank) for path, factors in fused.items()}, compression, inputs, modules, svd)


def stack_adapters(adapters: Mapping[str, Adapter], *, device: torch.device | None = None) -> Stacks[LoRAFactors]:
    """Stack the factors of adapters layer by layer, after checking that they belong together.

    Args:
        adapters: by name, for the messages.
        device: where they are to be fused. Default: where they are.

    Raises:
        AdapterError: if there is none, two of them differ in base model, layers or shapes (the message names both), or
            their updates are not their factors: see :func:`stack_updates`.
    """
    if dora := [name for name, adapter in adapters.items() if adapter.magnitudes]:
        raise AdapterError(f"{dora[0]} is DoRA, whose update is not B @ A alone; it needs the base weights")
    return _stacked(adapters, device)


def stack_updates(
    adapters: Mapping[str, Adapter], base: BaseWeights, *, device: torch.device | None = None
) -> Stacks[Any]:
    """As :func:`stack_adapters`, also for DoRA: the updates in row blocks, as they act on the base weights.

    Args:
        adapters: by name, for the messages.
        base: their base model; read only for DoRA, and block by block when the updates are.
        device: where they are to be fused. Default: where they are.

    Raises:
        AdapterError: as :func:`stack_adapters`, and if some adapters are DoRA and others are not.
        ValueError: if the base model cannot be read or lacks a layer.
    """
    stacks = _stacked(adapters, device)
    members = list(adapters.values())
    if not members[0].magnitudes:
        return stacks
    dense = {
        path: dora_updates(
            stack,
            torch.stack([member.magnitudes[path] for member in members]).to(stack.device),
            base.rows(path, flipped=members[0].flipped(path)),
        )
        for path, stack in stacks.items()
    }
    return Stacks(dense, stacks.modules)


def check_together(adapters: Mapping[str, Adapter]) -> None:
    """See that adapters belong together, before any work.

    Args:
        adapters: by name, for the messages.

    Raises:
        AdapterError: if there is none, or two of them differ in base model, task, kind, layers or shapes.
    """
    if not adapters:
        raise AdapterError("no adapter was given; fusing needs at least one")
    (first_name, first), *others = adapters.items()
    for name, adapter in others:
        if Path(adapter.base_model) != Path(first.base_model):
            raise AdapterError(
                f"{first_name} belongs to base model '{first.base_model}', {name} to '{adapter.base_model}'; if these "
                "are one model, say so in adapter_config.json (base_model_name_or_path)"
            )
        if adapter.revision != first.revision:
            raise AdapterError(
                f"the base model's revision is {first.revision or 'main'} in {first_name} and "
                f"{adapter.revision or 'main'} in {name}"
            )
        if adapter.quantization != first.quantization:
            goes = [
                "the original" if kind == "none" else f"the one in {kind} alone, as its {BASE_NAME} says"
                for kind in (first.quantization, adapter.quantization)
            ]
            raise AdapterError(
                f"of base model '{first.base_model}', {first_name} belongs on {goes[0]}, and {name} on {goes[1]}; fuse "
                "those of one kind"
            )
        if adapter.task_type != first.task_type:
            raise AdapterError(f"task_type is {first.task_type} in {first_name} and {adapter.task_type} in {name}")
        if adapter.fan_in_fan_out != first.fan_in_fan_out:
            raise AdapterError(
                f"fan_in_fan_out is {first.fan_in_fan_out} in {first_name} and {adapter.fan_in_fan_out} in {name}"
            )
        if bool(adapter.magnitudes) != bool(first.magnitudes):
            raise AdapterError(
                f"only {name if adapter.magnitudes else first_name} is DoRA, of {first_name} and {name}; make plain "
                "LoRA of it first (python -m seedlora merge, with that one alone, --method soup --rank 64)"
            )
        if bool(adapter.biases) != bool(first.biases):
            raise AdapterError(
                f"only {name if adapter.biases else first_name} has lora_bias, of {first_name} and {name}"
            )
        if odd := sorted(set(adapter.modules) ^ set(first.modules)):
            holder = name if odd[0] in adapter.modules else first_name
            raise AdapterError(f"{first_name} and {name} save different modules: only {holder} has {odd[0]}")
        for key, tensor in adapter.modules.items():
            if tensor.shape != first.modules[key].shape:
                shapes = tuple(first.modules[key].shape), tuple(tensor.shape)
                raise AdapterError(f"{key} has shape {shapes[0]} in {first_name} and {shapes[1]} in {name}")
        for path in sorted(set(adapter.copies) & set(first.copies)):
            if adapter.copies[path] != first.copies[path]:
                raise AdapterError(
                    f"{path} has different base weights in {first_name} and {name}: were vocabularies resized?"
                )
        if odd := sorted(set(adapter.layers) ^ set(first.layers)):
            holder = name if odd[0] in adapter.layers else first_name
            raise AdapterError(f"{first_name} and {name} adapt different layers: only {holder} has {odd[0]}")
        if odd := sorted(adapter.embeddings ^ first.embeddings):
            holder = name if odd[0] in adapter.embeddings else first_name
            raise AdapterError(f"{odd[0]} is an embedding only in {holder}, of {first_name} and {name}")
        for path, factors in adapter.layers.items():
            if factors.shape != first.layers[path].shape:
                raise AdapterError(
                    f"{path} has shape {first.layers[path].shape} in {first_name} and {factors.shape} in {name}"
                )


def _stacked(adapters: Mapping[str, Adapter], device: torch.device | None) -> Stacks[LoRAFactors]:
    check_together(adapters)
    members = list(adapters.values())
    return Stacks(
        {path: LoRAFactors.stack([member.layers[path].to(device) for member in members]) for path in members[0].layers},
        {key: [member.modules[key].to(device) for member in members] for key in members[0].modules},
    )


def _check_vocabulary(adapter: Adapter, base: str | Path) -> None:
    """See that the base model has the rows over which embeddings and heads were adapted.

    PEFT puts its copy of the base weights beside their factors. The fused folder has none, as servers want it: what
    the copy alone holds, the rows of a resized vocabulary, would be lost.
    """
    try:
        known = BaseWeights(base, cached=True).vocabulary if adapter.copies else None
    except (ValueError, OSError):
        known = None
    for path, (rows, _) in adapter.copies.items():
        if known is None:
            raise AdapterError(
                f"{path} was adapted over {rows} rows, and whether the base model '{base}' has as many is not known "
                "here; give its folder with --base MODEL"
            )
        if rows != known:
            raise AdapterError(
                f"{path} was adapted over {rows} rows, but the base model {base} has {known}: its vocabulary was "
                "resized. Save the resized base model, name it as base_model_name_or_path in adapter_config.json, and "
                "fuse again"
            )


def read_adapters(
    sources: Sequence[str | Path],
    *,
    base: BaseWeights | None = None,
    on_layer: Callable[[str], object] | None = None,
) -> dict[str, Adapter]:
    """Read adapter folders or hub ids, by the name under which each was given.

    With a base model, starts of PiSSA and OLoRA are subtracted, after it was seen that the adapters belong together.

    Args:
        sources: folders or hub ids.
        base: their base model, for adapters that are more than factors: as in :func:`seedlora.adapter.read_adapter`.
        on_layer: likewise.

    Raises:
        AdapterError: if one cannot be read, or is given twice; with ``base``, also as :func:`check_together`.
    """
    paths: dict[Path, str] = {}
    for source in sources:
        path = locate(source).resolve()
        if path in paths:
            raise AdapterError(f"{source} was given twice (also as {paths[path]}); each adapter counts once")
        paths[path] = str(source)
    found = {name: read_adapter(path, base=base, keep_start=True) for path, name in paths.items()}
    if base is None:
        return found
    check_together(found)
    return {name: without_start(adapter, base, on_layer=on_layer) for name, adapter in found.items()}


def base_of(sources: Sequence[str | Path], base: str | Path | None = None) -> BaseWeights:
    """The base model that is given, or else the one that the first adapter names; opened when it is needed."""
    if base is None:
        base = base_model_of(sources[0]) if sources else ""
    return BaseWeights(base)


def check_output(out: str | Path, sources: Sequence[str | Path], base: str | Path | None = None) -> None:
    """See that a result may take the place of what is at ``out``: of nothing, an empty folder, or an older result.

    Args:
        out: the folder to write.
        sources: adapter folders or hub ids.
        base: the base model's folder or hub id.

    Raises:
        ValueError: if ``out`` is or holds one of these, or anything else that no merge made, or cannot be written.
    """
    target = Path(out).resolve()
    above = next(folder for folder in target.parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"the output {out} cannot be written: {above} is no folder that may be written to")
    for folder in [*map(locate, sources), *([Path(base).expanduser()] if base else [])]:
        if folder.is_dir() and folder.resolve().is_relative_to(target):
            holds = "is" if folder.resolve() == target else "holds"
            raise ValueError(f"the output {out} {holds} {folder}, which would be deleted; give another folder")
    empty = target.is_dir() and not any(target.iterdir())
    if target.exists() and not empty and not (target / RECORD_NAME).is_file():
        raise ValueError(
            f"the output {out} is there and was not made by a merge (it holds no {RECORD_NAME}), so it is not "
            "replaced; give another folder"
        )


def describe_inputs(adapters: Mapping[str, Adapter]) -> dict[str, list[str]]:
    """What adapters are besides plain LoRA, and what of them was averaged whatever the rule; for ``fusion.json``."""
    kinds = sorted({kind for adapter in adapters.values() for kind in adapter.kinds})
    first = next(iter(adapters.values()))
    averaged = [*(["lora_bias"] if first.biases else []), *sorted(first.modules)]
    return ({"kinds": kinds} if kinds else {}) | ({"averaged": averaged} if averaged else {})


def average(adapters: Mapping[str, Adapter], bound: BoundRule) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Biases and full weights of the adapters, averaged, whatever the rule: they have no factors to apply it to.

    With the rule's ``weights``, biases are summed as it sums updates (``w_n / N``).

    Raises:
        AdapterError: as :func:`averaged`.
    """
    members = list(adapters.values())
    biases = {path: [m.biases[path] for m in members] for path in members[0].biases}
    modules = {key: [m.modules[key] for m in members] for key in members[0].modules}
    w = _weights(bound, len(members), "lora_bias") / len(members) if biases else torch.empty(0)
    return {path: _sum(each, w) for path, each in biases.items()}, averaged(modules, bound)


def averaged(modules: Mapping[str, Sequence[Tensor]], bound: BoundRule) -> dict[str, Tensor]:
    """The mean of full weights, by key; with the weights of the rule, brought to a sum of 1, or of its members alone.

    Raises:
        AdapterError: if the rule's weights add up to 0 or less, or are not as many as the adapters, or the rule chooses
            among the adapters by a score: what is averaged would be of all.
    """
    if not modules:
        return {}
    w = _weights(bound, len(next(iter(modules.values()))), min(modules))
    if not w.sum() > 0:
        raise AdapterError(f"modules_to_save are averaged, so weights must add up to more than 0, got {w.tolist()}")
    return {key: _sum(each, w / w.sum()) for key, each in modules.items()}


def _weights(bound: BoundRule, n: int, what: str) -> Tensor:
    """What the rule weighs the adapters by, 1 each unless it says otherwise; for ``what``, which is averaged."""
    if bound.name == "greedy_soup" and n > 1:
        if "members" not in bound.options:
            raise AdapterError(f"greedy_soup chooses among adapters, and {what} would be the mean of all; take soup")
        w, chosen = torch.zeros(n, dtype=torch.float64), list(bound.options["members"])
        w[chosen] = n / len(chosen)
        return w
    given = bound.options.get("weights")
    w = torch.as_tensor([1.0] * n if given is None else given, dtype=torch.float64)
    if len(w) != n:
        raise AdapterError(f"weights must be {n} numbers, one per adapter, got {w.tolist()}")
    return w


def _sum(tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    total = sum(float(x) * t.float() for x, t in zip(weights, tensors, strict=True))
    assert isinstance(total, Tensor)
    return total.to(tensors[0].dtype)


def fuse_folders(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    method: str | MergeRule = "seedlora",
    options: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    base: str | Path | None = None,
    on_layer: Callable[[str], object] | None = None,
) -> Path:
    """Fuse PEFT adapter folders into one that PEFT, vLLM, SGLang and others load.

    The result has one rank R and ``lora_alpha = R``, all scaling folded into ``B``, and zeros where servers want a
    module that nobody trained. ``fusion.json`` in it says how it was made: method, options, the sha256 of every input,
    and the error of what had to be compressed. A ``prompt.json`` or ``base.json`` that all inputs share goes with it.

    DoRA's updates have full rank: they are fused in row blocks, no layer is ever held whole unless its compression
    holds it, and the result is compressed to ``rank`` (by default about ``N*R``). Full weights of ``modules_to_save``
    and the vectors of ``lora_bias`` are averaged.

    Args:
        sources: adapter folders or hub ids, of one base model.
        out: the folder to write, whole or not at all; an older result is replaced, any other folder is refused.
        method: a name of :data:`seedlora.merge.METHODS`, or any rule.
        options: the method's keyword options.
        dtype: of the result; the rule then works on float32 copies. Default: that of the inputs, and float32 for PiSSA
            and OLoRA, whose start is.
        base: the base model, for DoRA, PiSSA and OLoRA; if it is on this machine, also to know its layers and how many
            rows an adapted embedding has. Default: the one that the adapters name.
        on_layer: called with each layer's path when it is done; before that, when PiSSA's start of it was computed.

    Raises:
        ValueError: for an unknown method or option, or an ``out`` that is not to be replaced (:func:`check_output`);
            ``AdapterError`` for adapters that cannot be read or fused.
    """
    bound = bind(method, options)
    weights = base_of(sources, base)
    check_output(out, sources, weights.source)
    adapters = read_adapters(sources, base=weights, on_layer=on_layer)
    hashes, run = hash_inputs(sources), run_around(out, sources)
    stacks = stack_updates(adapters, weights)
    first = next(iter(adapters.values()))
    _check_vocabulary(first, base or first.base_model)
    if dtype is not None:
        compute = torch.promote_types(dtype, torch.float32)
        stacks = Stacks({path: stack.to(compute) for path, stack in stacks.items()})
    biases, modules = average(adapters, bound)
    with layer_threads() as each:
        fused = fuse(stacks, bound, on_layer=on_layer, each=each)
        walk = map if first.magnitudes else each
        gains = list(walk(lambda path: float(gain(stacks[path], fused[path])), stacks if len(adapters) > 1 else ()))
    shapes = base_shapes(base or first.base_model, fan_in_fan_out=first.fan_in_fan_out)
    layers, unknown = complete(fused, shapes)
    if dtype is not None:
        layers = {path: factors.to(dtype) for path, factors in layers.items()}
        biases = {path: bias.to(dtype) for path, bias in biases.items()}
        modules = {key: tensor.to(dtype) for key, tensor in modules.items()}
    if biases:  # a layer that was added for the servers' sake needs one like the others
        biases |= {path: torch.zeros(f.shape[0], dtype=f.dtype) for path, f in layers.items() if path not in biases}
    record = fusion_record(bound, fused, hashes, base_model=first.base_model, run=run)
    record |= {} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}
    record |= {} if base is None else {"base": recorded(base, run)}
    record |= describe_inputs(adapters)
    if unknown:
        record["incomplete_groups"] = unknown
    if len(adapters) > 1:
        record["gain"] = gain_record(gains)
    card = model_card(record, max(factors.rank for factors in layers.values()), run=run)
    files = {RECORD_NAME: json.dumps(record, indent=2, default=str) + "\n", CARD_NAME: card}
    files |= {name: text for name in (PROMPT_NAME, BASE_NAME) if (text := common_text(sources, name))}
    config = universal_config(
        layers,
        base_model=first.base_model,
        revision=first.revision,
        fan_in_fan_out=first.fan_in_fan_out,
        lora_bias=bool(biases),
        modules_to_save=first.modules_to_save,
        task_type=first.task_type,
        auto_mapping=first.auto_mapping,
    )
    write_adapter(out, layers, config, files=files, embeddings=first.embeddings, biases=biases, modules=modules)
    return Path(out)


def gain_record(gains: Sequence[float]) -> dict[str, float]:
    """How much longer the fused updates are than the mean updates, over the layers; for ``fusion.json``."""
    return {"mean": sum(gains) / len(gains), "min": min(gains), "max": max(gains)}


def run_around(out: str | Path, sources: Sequence[str | Path]) -> Path | None:
    """The folder around ``out``, if it holds all that is fused: the run which these adapters are of."""
    run = Path(out).resolve().parent
    return run if all(locate(source).resolve().is_relative_to(run) for source in sources) else None


def recorded(source: str | Path, run: Path | None) -> str:
    """A folder or hub id for a record: as given; in a record of a run so that it is found from the run's folder."""
    if run is None or not Path(source).expanduser().is_dir():
        return str(source)
    folder = Path(source).expanduser().resolve()
    return str(folder.relative_to(run) if folder.is_relative_to(run) else folder)


def hash_inputs(sources: Sequence[str | Path]) -> dict[str, Future[str]]:
    """Start to hash the weights of folders or hub ids, beside what else is done; sha256 by name."""
    pool = ThreadPoolExecutor(1, "sha256")
    folders = {str(source): locate(source) for source in sources}
    hashes = {name: pool.submit(_weights_sha256, folder) for name, folder in folders.items()}
    pool.shutdown(wait=False)
    return hashes


def _weights_sha256(folder: Path) -> str:
    return files_sha256(shards(folder) if is_model(folder) else [folder / WEIGHTS_NAME])


def common_text(sources: Sequence[str | Path], name: str) -> str | None:
    """What a file says beside all of them: the prompt or the base model of their training, if it is known and one."""
    files = [locate(source) / name for source in sources]
    texts = {file.read_text(encoding="utf-8") if file.is_file() else None for file in files}
    return texts.pop() if len(texts) == 1 else None


def rule_record(bound: BoundRule) -> dict[str, Any]:
    """What a rule is, for records: its method, its options, and those that every method has as far as they are set."""
    use = {key: value for key, value in asdict(bound.use).items() if value is not None}
    return {"method": bound.name, "options": dict(bound.options), "use": use}


def fusion_record(
    bound: BoundRule,
    fused: Fused | None,
    hashes: Mapping[str, Future[str]],
    *,
    base_model: str,
    run: Path | None = None,
) -> dict[str, Any]:
    """How a fused adapter was made, for ``fusion.json``.

    Args:
        bound: the rule.
        fused: its result; None if it went into a base model without compression.
        hashes: of the inputs, as :func:`hash_inputs` gives them.
        base_model: name or path of the base model.
        run: as :func:`run_around` says; the inputs are named relative to it, so that a run can be moved.
    """
    record: dict[str, Any] = {
        **rule_record(bound),
        "source": bound.method.source,
        "inputs": [{"name": recorded(source, run), "sha256": digest.result()} for source, digest in hashes.items()],
        "base_model": base_model,
        "seedlora": version("seedlora"),
    }
    if fused is not None and fused.compression:
        errors = list(fused.compression.values())
        record["compression"] = {
            "relative_error_mean": sum(errors) / len(errors),
            "relative_error_max": max(errors),
            "svd": dict(Counter(fused.svd.values())),
            "layers": fused.compression,
        }
    if fused is not None and fused.inputs:
        record["inputs_compressed"] = {"relative_error_max": max(fused.inputs.values()), "layers": fused.inputs}
    return record
