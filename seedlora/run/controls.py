"""The controls that are trained after the replicas: which there are, and what each is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from seedlora.names import ALL_CONTROLS, EQUAL_TOKENS, LONG_SEED, OUTER_SEED, WIDE_BATCHES, WIDE_SEED
from seedlora.records.training import TrainedRow
from seedlora.training.replicas import Replica

#: By what is asked for, in the order in which they are trained.
TRAINED: Mapping[str, Sequence[str]] = {
    ALL_CONTROLS: (LONG_SEED, WIDE_SEED),
    EQUAL_TOKENS: (LONG_SEED, *WIDE_BATCHES),
}


def trained_controls(controls: str, *, outer: bool) -> tuple[str, ...]:
    """Return the controls that are trained.

    Args:
        controls: what is asked for.
        outer: whether the replicas take outer steps, so that one seed with them is a control.
    """
    return (*TRAINED.get(controls, ()), *([OUTER_SEED] if outer and controls == EQUAL_TOKENS else []))


def control_replicas(control: str, like: Replica, *, seeds: Sequence[int], trained: int) -> tuple[Replica, ...]:
    """Return what a fit trains for a control, the control itself first: it starts and learns as a replica does.

    A wide batch is as many replicas as there are seeds, with the rows of each, which are one to the end.

    Args:
        control: its name.
        like: the replica.
        seeds: all of the run.
        trained: replicas that are trained.
    """
    own = like.options
    if control == WIDE_SEED:
        own = replace(own, rank_factor=trained)
    if control in WIDE_BATCHES:
        own = replace(own, rate_factor=len(seeds) ** WIDE_BATCHES[control])
    first = replace(like, name=control, options=own)
    if control not in WIDE_BATCHES:
        return (first,)
    return tuple(
        replace(first, name=f"{control}_{i}" if i else control, order_seed=seed, helps=i > 0)
        for i, seed in enumerate(seeds)
    )


def best_of(names: Sequence[str], rows: Mapping[str, TrainedRow]) -> str | None:
    """Return the adapter with the lowest validation loss at the end of its training; None if none is known."""
    losses = {name: rows[name]["validation_loss"] for name in names if "validation_loss" in rows.get(name, {})}
    return min(losses, key=losses.__getitem__, default=None)
