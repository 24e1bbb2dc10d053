"""In ``report.json``: how the validation loss depends on the options that are swept."""

from __future__ import annotations

from typing import TypedDict


class DroppedSeed(TypedDict):
    """Tell when a replica was dropped.

    Attributes:
        step: optimizer step after which it was.
        loss: validation loss then.
    """

    step: int
    loss: float


class SweepRow(TypedDict):
    """Describe one set of the values that are swept.

    Attributes:
        values: value of each option.
        losses: validation loss of each seed with these values that was trained to the end.
        mean: mean of these losses; null without any.
        dropped: of each seed that was dropped on the way, the step and the validation loss then.
    """

    values: dict[str, float | str]
    losses: dict[str, float]
    mean: float | None
    dropped: dict[str, DroppedSeed]


class SweepRecord(TypedDict):
    """Tell how the validation loss depends on the options that are swept.

    Attributes:
        options: names of the options.
        rows: what each set of values gives.
        best: label of the replica with the lowest loss; null if none was validated.
        sentences: which replica is the best, and what soup and greedy soup have beside it.
    """

    options: list[str]
    rows: list[SweepRow]
    best: str | None
    sentences: list[str]
