"""Apply a merge rule layer by layer: the only place where the layers of a model are walked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from seedlora.merge.averages import average_modules
from seedlora.merge.bound_rule import BoundRule, MergeRule
from seedlora.merge.registry import make_rule
from seedlora.updates.compression import Compressed, compress_each
from seedlora.updates.dense import Updates
from seedlora.updates.factors import LoRAFactors
from seedlora.updates.stacks import Stacks, full_weights

#: Layers that are merged at a time, at most: each holds some copies of its factors.
_LAYERS_AT_A_TIME = 4


@dataclass(frozen=True, eq=False)
class Fused(Stacks[LoRAFactors]):
    """The result of a merge: one adapter per layer path, averaged full weights, and what compression took away.

    Args:
        compression: relative Frobenius error of each layer that was compressed to a rank; empty if all are exact.
        svd: which SVD each of these got, ``exact`` or ``randomized``.
        inputs: relative Frobenius error of updates of full rank that were compressed before the rule, because it works
            on factors: the largest of a layer's adapters.
    """

    compression: Mapping[str, float] = field(default_factory=dict)
    svd: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, float] = field(default_factory=dict)


def merged_updates(
    stacks: Mapping[str, Updates],
    rule: MergeRule | BoundRule,
    *,
    order: Iterable[str] | None = None,
    inputs: dict[str, float] | None = None,
) -> Iterator[tuple[str, Updates]]:
    """Walk the layers of a model and apply a rule to each: a rule that looks at all layers first does so here.

    Args:
        stacks: the adapters of every layer by path.
        rule: a rule, or one with options as :func:`seedlora.merge.registry.make_rule` gives it. One that needs factors
            gets updates of full rank compressed, each to the rule's ``rank``, by default ``N*R``.
        order: paths in the order in which they are wanted. Default: that of ``stacks``.
        inputs: filled with the error of what was compressed for the rule, by path.

    Raises:
        ValueError: if the rule's ``layers`` selects none.
    """
    merged = _merge_function(stacks, make_rule(rule), {} if inputs is None else inputs)
    for path in order if order is not None else stacks:
        yield path, merged(path)


def _merge_function(
    stacks: Mapping[str, Updates], bound: BoundRule, inputs: dict[str, float]
) -> Callable[[str], Updates]:
    """Look at all layers, if the rule has to, and return what :func:`merged_updates` applies to the path of each."""
    chosen = [path for path in stacks if bound.selects(path)]
    if stacks and not chosen:
        raise ValueError(
            f"layers={bound.common.layers!r} selects none of {len(stacks)} layers, e.g. {next(iter(stacks))}"
        )
    made: dict[str, LoRAFactors] = {}

    def taken(path: str) -> Updates:
        stack = stacks[path]
        if isinstance(stack, LoRAFactors) or bound.method.dense:
            return stack
        if path not in made:
            made[path], error = compress_each(
                stack, bound.common.rank or len(stack) * stack.rank, seed=bound.common.seed
            )
            inputs[path] = error
        return made[path]

    facts = bound.survey(lambda: ((path, taken(path)) for path in chosen)) if chosen else {}

    def merged(path: str) -> Updates:
        return bound.update(path, taken(path), facts) if bound.selects(path) else bound.left_out(stacks[path])

    return merged


@contextmanager
def layer_threads() -> Iterator[Callable[..., Iterator[Any]]]:
    """Give a ``map`` over layers that is done by several threads of one core each, for CPU tensors.

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


def merge_stacks(
    stacks: Mapping[str, Updates],
    rule: MergeRule | BoundRule,
    *,
    on_layer: Callable[[str], object] | None = None,
    each: Callable[..., Iterator[Any]] = map,
) -> Fused:
    """Apply a merge rule to the stack of every layer; ranks are padded with zeros to the largest, as servers need.

    Args:
        stacks: the adapters of every layer by path.
        rule: a rule, or one with options as :func:`seedlora.merge.registry.make_rule` gives it. Dense results are
            compressed to its ``rank``, by default ``N*R`` (one more where the rule adds a constant); the result says
            with which error.
        on_layer: called with each layer's path when it is done.
        each: how to go through the layers, as :func:`layer_threads` gives it. What may be dense, and as large as the
            layer, is done one after the other all the same.
    """
    bound = make_rule(rule)
    dense = [stack for stack in stacks.values() if not isinstance(stack, LoRAFactors)]
    if dense and bound.common.rank is None and not bound.method.dense:
        bound = replace(bound, common=replace(bound.common, rank=max(len(stack) * stack.rank for stack in dense)))
    fused, compression, svd, inputs = {}, {}, {}, dict[str, float]()
    merged = _merge_function(stacks, bound, inputs)

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
    modules = {key: [mean] for key, mean in average_modules(full_weights(stacks), bound).items()}
    padded = {path: factors.padded(rank) for path, factors in fused.items()}
    return Fused(padded, modules, compression=compression, svd=svd, inputs=inputs)
