"""A replica, and the errors that end its training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Replica:
    """One adapter of the stack: its name, and what its seed decides.

    Args:
        name: of the PEFT adapter.
        init_seed: of the initial weights and of the dropout.
        order_seed: of the order of the data.
    """

    name: str
    init_seed: int
    order_seed: int


class StoppedError(RuntimeError):
    """A run that ends before its time, by its own decision. The message says why, in one sentence."""


class DivergedError(StoppedError):
    """Losses or weights that are not finite: the same run would end so again."""
