"""Make the rules that are tried on validation data, and the controls beside them.

Pure functions of adapters: nothing here knows how they are scored.

Shape legend: ``N`` adapters, ``I`` validation rows.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from itertools import combinations

from seedlora.merge.bound_rule import BoundRule
from seedlora.merge.common_options import COMMON_DEFAULTS
from seedlora.merge.registry import make_rule
from seedlora.updates.algebra import gain, weighted_sum
from seedlora.updates.factors import LoRAFactors
from seedlora.updates.stacks import Layers, Stacks, full_weights

#: Powers of :func:`seedlora.merge.methods.seedlora.seedlora_gain` that are tried; 0 is soup.
POWERS = (0.25, 0.5, 0.75, 1.0, 1.25)
#: Factors on the soup that are tried; 1 is soup.
SCALES = (0.6, 0.8, 1.2, 1.4, 1.6, 2.0)
#: Methods that :func:`any_method` tries at their defaults, beside the gain family and the scaled soups.
TRIED = ("seedlora", "model_stock", "karcher", "ties", "dare_ties", "knots_ties")


def gain_family(
    paths: Sequence[str], *, powers: Sequence[float] = POWERS, options: Mapping[str, object] | None = None
) -> dict[str, BoundRule]:
    """Return soup, and :func:`seedlora.merge.methods.seedlora.seedlora_gain` with each power.

    Each power is tried on all layers, on attention alone and on FFN alone.

    Args:
        paths: of the layers; where all are of one kind, there are no parts of them to try.
        powers: to try.
        options: of the rule, besides ``p``; if they name ``layers``, these alone are tried.
    """
    options = dict(options or {})
    found = {"soup": make_rule("soup", {key: value for key, value in options.items() if key in COMMON_DEFAULTS})}
    for layers in ("all", "attention", "ffn"):
        use = {} if layers == "all" else {"layers": layers, "rest": "soup"}
        if use and ("layers" in options or not 0 < sum(map(make_rule("soup", use).selects, paths)) < len(paths)):
            continue
        for p in powers:
            name = f"seedlora_gain p={p:g}" + (f" on {layers}" if use else "")
            found[name] = make_rule("seedlora_gain", {**options, "p": p, **use})
    return found


def scaled_soups(n: int, *, scales: Sequence[float] = SCALES) -> dict[str, BoundRule]:
    """Return soup and its multiples: the control of every rule that changes the length of the average.

    Args:
        n: adapters that are averaged.
        scales: to try.
    """
    multiples = {f"soup x {scale:g}": make_rule("task_arithmetic", {"scale": scale / n}) for scale in scales}
    return {"soup": make_rule("soup"), **multiples}


def any_method(paths: Sequence[str], n: int) -> dict[str, BoundRule]:
    """Return the gain family, the scaled soups, and the methods of :data:`TRIED` as they are."""
    return {**gain_family(paths), **scaled_soups(n), **{name: make_rule(name) for name in TRIED}}


def seed_times_gain(stacks: Layers, fused: Layers, *, index: int) -> Stacks[LoRAFactors]:
    r"""Make one adapter as much longer in each layer as the fused one is than the mean of all.

    .. math:: \Delta = \frac{\|\Delta_\text{fused}\|}{\|\bar\Delta\|} \Delta_i

    What a fused adapter gains by its length alone, this control gains too. Full weights are the adapter's own.

    Args:
        stacks: the adapters of every layer by path.
        fused: what was made of them.
        index: of the adapter to take.
    """
    found = {
        path: weighted_sum(LoRAFactors(stack.A[[index]], stack.B[[index]]), gain(stack, fused[path])[None])
        for path, stack in stacks.items()
    }
    return Stacks(found, {key: [each[index]] for key, each in full_weights(stacks).items()})


def subsets(n: int, *, most: int = 10) -> list[tuple[int, ...]]:
    """Return subsets of ``range(n)`` of every size from 1: all of a size, or ``most`` of them, always the same."""
    found = []
    for size in range(1, n + 1):
        if math.comb(n, size) <= most:
            found += list(combinations(range(n), size))
            continue
        drawn: set[tuple[int, ...]] = set()
        generator = random.Random(size)  # noqa: S311 - not for secrets
        while len(drawn) < most:
            drawn.add(tuple(sorted(generator.sample(range(n), size))))
        found += sorted(drawn)
    return found
