"""Successive halving: after which steps the worse half of the replicas is dropped, and who that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from seedlora.utils.options import name_option

#: What becomes of the rows that dropped replicas would have seen: nobody sees them, or those that go on have more rows.
HALVED_ROWS = ("saved", "shared")


class HalvingRound(NamedTuple):
    """Say after which optimizer step replicas are dropped, and how many go on if none was lost before.

    Attributes:
        step: after which.
        left: how many go on.
        times: how many times its rows each of them has in a step from then on.
    """

    step: int
    left: int
    times: int = 1


def survivors(n: int) -> int:
    """Return how many of n replicas go on: half of them, the one in the middle too.

    >>> [survivors(n) for n in (6, 3, 2, 1)]
    [3, 2, 1, 1]
    """
    return math.ceil(n / 2)


def check_parts(parts: Sequence[float], n: int) -> None:
    """Raise ValueError unless these are ascending parts of a run after which n replicas can be halved."""
    if not parts or not all(0 < part < 1 for part in parts) or sorted(set(parts)) != list(parts):
        raise ValueError(
            f"{name_option('ensemble.halving')} is a list of parts of the steps between 0 and 1, ascending, "
            f"[0.25, 0.5] for example; got {list(parts)}"
        )
    left = n
    for done, part in enumerate(parts):
        if left == 1:
            raise ValueError(
                f"{name_option('ensemble.halving')}: {part:g} would drop nobody: of {n} replica"
                f"{'' if n == 1 else 's'} one is left {'by then' if done else 'from the start'}; leave it out"
            )
        left = survivors(left)


def halving_rounds(
    parts: Sequence[float], *, steps: int, n: int, shares_rows: bool = False
) -> tuple[HalvingRound, ...]:
    """Return the halvings of n replicas that train for so many steps.

    Args:
        parts: of the steps, after which a half is dropped.
        steps: of a replica that is not dropped.
        n: replicas.
        shares_rows: whether those that go on have more rows in a step, at most as many in all as there were.

    Raises:
        ValueError: if two of them, or one and the start or the end, are the same step.

    Example:
        >>> halving_rounds([0.25, 0.5], steps=12, n=6, shares_rows=True)
        (HalvingRound(step=3, left=3, times=2), HalvingRound(step=6, left=2, times=3))
    """
    rounds: list[HalvingRound] = []
    step, left = 0, n
    for part in parts:
        before, step, left = step, round(part * steps), survivors(left)
        if not before < step < steps:
            raise ValueError(
                f"{name_option('ensemble.halving', list(parts))}: {part:g} of {steps} steps is step "
                f"{step}, which must be after step {before} and before the last; train for more steps, or choose "
                "other parts"
            )
        rounds.append(HalvingRound(step, left, n // left if shares_rows else 1))
    return tuple(rounds)


def steps_of_all(rounds: Sequence[HalvingRound], *, steps: int, n: int) -> int:
    """Return the optimizer steps of all replicas together, one with k times the rows as k.

    >>> steps_of_all(halving_rounds([0.25, 0.5], steps=12, n=6), steps=12, n=6)
    39
    """
    total, before, each = 0, 0, n
    for one in rounds:
        total, before, each = total + each * (one.step - before), one.step, one.left * one.times
    return total + each * (steps - before)


class Halved(NamedTuple):
    """Hold who goes on and who is dropped, each with the lowest loss first."""

    kept: Sequence[str]
    dropped: Sequence[str]


def halve(losses: Mapping[str, float]) -> Halved:
    """Drop the replicas with the highest losses, of equals the later ones; no number is the highest.

    >>> halve({"a": 2.0, "b": float("nan"), "c": 1.0, "d": 2.0})
    Halved(kept=['c', 'a'], dropped=['d', 'b'])
    """
    ranked = sorted(losses, key=lambda name: math.inf if math.isnan(losses[name]) else losses[name])
    left = survivors(len(ranked))
    return Halved(ranked[:left], ranked[left:])
