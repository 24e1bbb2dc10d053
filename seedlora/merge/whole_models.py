"""Merge whole models that were trained in full from one base model.

Shape legend: ``D`` output features, ``K`` input features, ``P`` rows of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from seedlora.merge.averages import average_modules
from seedlora.merge.bound_rule import BoundRule, MergeRule
from seedlora.merge.layers import merged_updates
from seedlora.merge.model_folders import WeightChange, add_update, write_model, write_model_notes
from seedlora.merge.record import fusion_record, hash_inputs, recorded, run_around
from seedlora.merge.registry import METHODS, make_rule
from seedlora.model.weight_files import WeightFiles
from seedlora.updates.dense import DenseUpdates, block_rows
from seedlora.utils.files import atomic_folder


def merge_models(
    sources: Sequence[str | Path],
    base: WeightFiles,
    out: Path,
    bound: BoundRule,
    on_layer: Callable[[str], object] | None,
) -> None:
    """Merge models that were trained in full from a base model; ``out`` is written whole or not at all."""
    models = [WeightFiles(source) for source in sources]
    change = make_weight_merger(models, base, bound, on_layer=on_layer)
    hashes = hash_inputs(sources)
    with atomic_folder(out) as folder:
        write_model(folder, base, change)
        run = run_around(out, sources)
        record = fusion_record(bound, None, hashes, base_model=str(base.source), run=run)
        vectors = [key for key in base.files if len(base.shape(key)) == 1]
        record["kinds"] = ["whole models"]
        record["averaged"] = sorted({key.split(".")[-2] for key in vectors if "." in key})
        record["into_base"] = recorded(base.source, run)
        write_model_notes(folder, record, sources, out=out.name, run=run)


def make_weight_merger(
    models: Sequence[WeightFiles],
    base: WeightFiles,
    rule: MergeRule | BoundRule,
    *,
    on_layer: Callable[[str], object] | None = None,
) -> WeightChange:
    r"""Return the change that makes the merge of models, which were trained in full, out of their base model.

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
        _check_same_shape(models, base, key)
        if len(base.shape(key)) == 2:
            stacks[key.removesuffix(".weight")] = _training_differences(models, base, key)
    walk = merged_updates(stacks, bound)

    def change(key: str, weight: Tensor) -> Tensor:
        if weight.ndim == 2:
            path, update = next(walk)
            assert path == key.removesuffix(".weight")
            weight = add_update(weight, update, flipped=False).weight
            for model in models:
                model.close(model.files[key])
            if on_layer is not None:
                on_layer(path)
            return weight
        if not weight.is_floating_point():
            return weight
        each = [model.tensor(key).float() for model in models]
        return average_modules({key: each}, bound)[key].to(weight.dtype)

    return change


def check_dense(rule: BoundRule) -> None:
    """Raise ValueError if a rule cannot merge models that were trained in full."""
    if not rule.method.dense:
        able = ", ".join(name for name, method in METHODS.items() if method.dense)
        raise ValueError(
            f"Merge method '{rule.name}' works on the factors of adapters, and weights trained in full have none; "
            f"choose one of {able}"
        )
    if rule.common.rank is not None:
        raise ValueError(
            f"rank {rule.common.rank} is for adapters; weights trained in full are merged at their full rank"
        )


def _check_same_shape(models: Sequence[WeightFiles], base: WeightFiles, key: str) -> None:
    """Raise ValueError if a model lacks a tensor of the base model, or has it in another shape."""
    for model in models:
        if key not in model.files or model.shape(key) != base.shape(key):
            found = f"in shape {model.shape(key)}" if key in model.files else "not at all"
            raise ValueError(
                f"{model.source} has '{key}' {found}, the base model {base.source} in {base.shape(key)}; give the "
                "model that it was trained from"
            )


def _training_differences(models: Sequence[WeightFiles], base: WeightFiles, key: str) -> DenseUpdates:
    """Return what training added to a matrix, all models together, by row blocks."""
    (d, k), n = base.shape(key), len(models)
    step = block_rows(n, k)

    def blocks() -> Iterator[Tensor]:
        before, after = base.row_reader_of(key), [model.row_reader_of(key) for model in models]
        for start in range(0, d, step):
            w_PK = before(start, start + step).float()
            yield torch.stack([rows(start, start + step).float() - w_PK for rows in after])

    return DenseUpdates((d, k), min(d, k), torch.float32, torch.device("cpu"), blocks, n)
