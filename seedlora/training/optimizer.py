"""The optimizer and its schedule."""

from __future__ import annotations

import math


def learning_rate_factor(step: int, schedule: str, *, warmup: int, total: int) -> float:
    r"""The factor on the learning rate in optimizer step ``step`` (from 0).

    :math:`(step + 1) / warmup` during the warm-up; then, with progress p from 0 to 1 over the rest,
    :math:`(1 + \cos \pi p) / 2`, :math:`1 - p` or 1.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[schedule]
