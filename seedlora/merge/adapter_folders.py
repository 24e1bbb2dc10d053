"""Merge adapter folders into an adapter folder that servers load.

The only place where the layers of a model are walked.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seedlora.adapters.adapter import BASE_NAME, PROMPT_NAME, Adapter, locate
from seedlora.adapters.model_card import CARD_NAME, model_card
from seedlora.adapters.servers import add_zero_updates, base_shapes
from seedlora.adapters.writing import universal_config, write_adapter
from seedlora.merge.averages import Averages, average_biases_and_modules
from seedlora.merge.bound_rule import MergeRule
from seedlora.merge.inputs import check_vocabulary, read_adapters, stack_updates, stored_dtype, weight_files_of
from seedlora.merge.layers import layer_threads, merge_stacks
from seedlora.merge.record import (
    common_files,
    common_tokenizer,
    fusion_record,
    gain_record,
    hash_inputs,
    record_kinds,
    recorded,
    run_around,
)
from seedlora.merge.registry import make_rule
from seedlora.records.fusion import FUSION
from seedlora.updates.algebra import gain, is_nothing
from seedlora.updates.dense import Updates
from seedlora.updates.factors import LoRAFactors
from seedlora.updates.stacks import Stacks
from seedlora.utils.places import expanded


def check_output(out: str | Path, sources: Sequence[str | Path], base: str | Path | None = None) -> None:
    """Check that a result may take the place of what is at ``out``: of nothing, an empty folder, or an older result.

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
    for folder in [*map(locate, sources), *([expanded(base)] if base else [])]:
        if folder.is_dir() and folder.resolve().is_relative_to(target):
            holds = "is" if folder.resolve() == target else "holds"
            raise ValueError(f"the output {out} {holds} {folder}, which would be deleted; give another folder")
    empty = target.is_dir() and not any(target.iterdir())
    if target.exists() and not empty and not (target / FUSION.name).is_file():
        raise ValueError(
            f"the output {out} is there and was not made by a merge (it holds no {FUSION.name}), so it is not "
            "replaced; give another folder"
        )


def merge_folders(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    method: str | MergeRule = "seedlora",
    options: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    base: str | Path | None = None,
    on_layer: Callable[[str], object] | None = None,
) -> Path:
    """Merge PEFT adapter folders into one that PEFT, vLLM, SGLang and others load.

    The result has one rank R and ``lora_alpha = R``, all scaling folded into ``B``, and zeros where servers want a
    module that nobody trained. ``fusion.json`` in it says how it was made: method, options, the sha256 of every input,
    and the error of what had to be compressed. A ``prompt.json`` or ``base.json`` that all inputs share goes with it.

    DoRA's updates have full rank: they are merged in row blocks, no layer is ever held whole unless its compression
    holds it, and the result is compressed to ``rank`` (by default about ``N*R``). Full weights of ``modules_to_save``
    and the vectors of ``lora_bias`` are averaged.

    Args:
        sources: adapter folders or hub ids, of one base model.
        out: the folder to write, whole or not at all; an older result is replaced, any other folder is refused.
        method: a name of :data:`seedlora.merge.registry.METHODS`, or any rule.
        options: the method's keyword options.
        dtype: of the result; the rule then works on float32 copies. Default: that in which the inputs are stored, and
            float32 for PiSSA and OLoRA, whose start is. It is rounded to once, at the end.
        base: the base model, for DoRA, PiSSA and OLoRA; if it is on this machine, also to know its layers and how many
            rows an adapted embedding has. Default: the one that the adapters name.
        on_layer: called with each layer's path when it is done; before that, when PiSSA's start of it was computed.

    Raises:
        ValueError: for an unknown method or option, or an ``out`` that is not to be replaced (:func:`check_output`);
            ``AdapterError`` for adapters that cannot be read or fused.

    Example:
        >>> from peft import LoraConfig
        >>> from seedlora import LoRAFactors, read_adapter, write_adapter
        >>> for seed in (1, 2):
        ...     factors = LoRAFactors(A=torch.ones(1, 2, 8), B=torch.full((1, 6, 2), float(seed)))
        ...     config = LoraConfig(r=2, lora_alpha=2, target_modules=["up_proj"])
        ...     write_adapter(f"seed_{seed}", {"model.layers.0.mlp.up_proj": factors}, config)
        >>> merge_folders(["seed_1", "seed_2"], "fused", method="soup")
        PosixPath('fused')
        >>> read_adapter("fused").layers["model.layers.0.mlp.up_proj"].dense().unique()  # 2 + 4, over 2
        tensor([3.])
    """
    bound = make_rule(method, options)
    weights = weight_files_of(sources, base)
    check_output(out, sources, weights.source)
    adapters = read_adapters(sources, base=weights, on_layer=on_layer)
    hashes, run = hash_inputs(sources), run_around(out, sources)
    stacks = stack_updates(adapters, weights)
    first = next(iter(adapters.values()))
    base_model = base or first.base_model
    check_vocabulary(first, base_model)
    if dtype is not None:
        compute = torch.promote_types(dtype, torch.float32)
        stacks = Stacks({path: stack.to(compute) for path, stack in stacks.items()})
    averages = average_biases_and_modules(adapters, bound)
    with layer_threads() as each:
        fused = merge_stacks(stacks, bound, on_layer=on_layer, each=each)
        gains = _gains(stacks, fused, map if first.magnitudes else each) if len(adapters) > 1 else []
    complete = add_zero_updates(
        fused, base_shapes(base_model, task_type=first.task_type, fan_in_fan_out=first.fan_in_fan_out)
    )
    result = _in_dtype(complete.layers, averages, dtype or stored_dtype(adapters.values()), modules=dtype)
    record = fusion_record(bound, fused, hashes, base_model=first.base_model, run=run)
    if not averages.change_anything and all(map(is_nothing, fused.values())):
        record["changes_nothing"] = True
    if dtype is not None:
        record["dtype"] = str(dtype).removeprefix("torch.")
    if base is not None:
        record["base"] = recorded(base, run)
    record_kinds(record, adapters)
    if complete.unknown:
        record["incomplete_groups"] = complete.unknown
    if len(adapters) > 1:
        record["gain"] = gain_record(gains)
    card = model_card(record, max(factors.rank for factors in result.layers.values()), out=Path(out).name, run=run)
    files: dict[str, str | bytes] = {FUSION.name: FUSION.text(record), CARD_NAME: card}
    files |= common_files(sources, (PROMPT_NAME, BASE_NAME)) | common_tokenizer(sources)
    write_adapter(
        out,
        result.layers,
        _config_of(first, result),
        files=files,
        embeddings=first.embeddings,
        biases=result.biases,
        modules=result.modules,
    )
    return Path(out)


class _Result(NamedTuple):
    """All tensors of a fused adapter: updates and biases by layer path, full weights by key within the model."""

    layers: dict[str, LoRAFactors]
    biases: dict[str, Tensor]
    modules: dict[str, Tensor]


def _gains(
    stacks: Mapping[str, Updates], fused: Mapping[str, LoRAFactors], each: Callable[..., Iterator[float]]
) -> list[float]:
    """Return how much longer the fused update of each layer is than the mean update.

    Args:
        stacks: the adapters of every layer by path.
        fused: the result by path.
        each: how to go through the layers, as :func:`seedlora.merge.layers.layer_threads` gives it.
    """
    return list(each(lambda path: float(gain(stacks[path], fused[path])), stacks))


def _in_dtype(
    layers: dict[str, LoRAFactors], averages: Averages, dtype: torch.dtype | None, *, modules: torch.dtype | None
) -> _Result:
    """Return the tensors of the result in its dtype, with a bias for every layer if some have one.

    Args:
        layers: the fused updates.
        averages: of biases and full weights.
        dtype: of factors and biases; None leaves them as they are.
        modules: likewise of full weights.
    """
    biases, full = averages
    if dtype is not None:
        layers = {path: factors.to(dtype) for path, factors in layers.items()}
        biases = {path: bias.to(dtype) for path, bias in biases.items()}
    if modules is not None:
        full = {key: tensor.to(modules) for key, tensor in full.items()}
    if biases:  # a layer that was added for the servers' sake needs one like the others
        biases |= {path: torch.zeros(f.shape[0], dtype=f.dtype) for path, f in layers.items() if path not in biases}
    return _Result(layers, biases, full)


def _config_of(first: Adapter, result: _Result) -> dict[str, Any]:
    """Return the configuration of a fused adapter, which is for the base model of the first of the inputs."""
    return universal_config(
        result.layers,
        base_model=first.base_model,
        revision=first.revision,
        fan_in_fan_out=first.fan_in_fan_out,
        lora_bias=bool(result.biases),
        modules_to_save=first.modules_to_save,
        task_type=first.task_type,
        auto_mapping=first.auto_mapping,
    )
