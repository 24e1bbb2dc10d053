"""The learning rate over the steps of a fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seedlora.training.model_options import ModelOptions


def learning_rate_factor(step: int, schedule: str, *, warmup: int, total: int) -> float:
    r"""Return the factor on the learning rate in optimizer step ``step`` (from 0).

    :math:`(step + 1) / warmup` during the warm-up; then, with progress p from 0 to 1 over the rest,
    :math:`(1 + \cos \pi p) / 2`, :math:`1 - p` or 1.

    >>> learning_rate_factor(0, "linear", warmup=2, total=4), learning_rate_factor(3, "linear", warmup=2, total=4)
    (0.5, 0.5)
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[schedule]


def rate_schedule(options: ModelOptions, *, total: int) -> Callable[[int], float]:
    """Return the factor on the learning rate as a function of the optimizer step.

    Args:
        options: which schedule, and its warm-up.
        total: optimizer steps of the run.
    """
    warmup = warmup_of(total, ratio=options.warmup_ratio, steps=options.warmup_steps)
    return partial(learning_rate_factor, schedule=options.lr_scheduler, warmup=warmup, total=total)


def warmup_of(total: int, *, ratio: float, steps: int | None) -> int:
    """Return the steps in which the rate grows: those given, or a part of the run's."""
    return math.ceil(ratio * total) if steps is None else steps
