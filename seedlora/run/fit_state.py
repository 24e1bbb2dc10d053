"""The state of one fit of an ensemble, as the parts of the callback share it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from seedlora.run.budget import ReplicaBudget


@dataclass
class BestValidation:
    """Remember the best validation of a replica, and how long ago it was.

    Args:
        loss: of it.
        step: the optimizer step after which it was.
        weights: of the replica then, on the CPU, if they are kept.
        stale: validations since.
        stopped: the optimizer step after which the replica was stopped, if it was.
    """

    loss: float
    step: int
    weights: list[Tensor] = field(default_factory=list)
    stale: int = 0
    stopped: int | None = None

    def is_beaten_by(self, loss: float) -> bool:
        """Return whether a loss is better; any is better than NaN, which nothing would ever be less than."""
        return loss < self.loss or math.isnan(self.loss)


class Drop(NamedTuple):
    """Say after which optimizer step a replica was dropped by a halving, and its validation loss then."""

    step: int
    loss: float


@dataclass
class FitState:
    """Remember what the fit at hand trains, how long, and what has become of it so far.

    Args:
        control: the control in training; None while seeds are.
        share: each replica's part of the trainer's epochs or steps.
        best: the best validations of the replicas, by name, if they are watched.
        dropped: the replicas that a halving left out, by name.
        terminated: whether a SIGTERM has come.
        began: whether a step was begun.
    """

    control: str | None = None
    share: ReplicaBudget = field(default_factory=ReplicaBudget)
    best: dict[str, BestValidation] = field(default_factory=dict)
    dropped: dict[str, Drop] = field(default_factory=dict)
    terminated: bool = False
    began: bool = False

    def begin(self, control: str | None, share: ReplicaBudget) -> None:
        """Forget the fit before."""
        self.control, self.share, self.best, self.dropped, self.began = control, share, {}, {}, False
