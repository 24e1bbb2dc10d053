"""``trained.json``, ``excluded.json`` and ``control.json``: what became of each adapter's training."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from seedlora.names import CONTROL_NAME, EXCLUDED_NAME, TRAINED_NAME
from seedlora.records.json_file import JSONFile


class TrainedRow(TypedDict):
    """Tell how long one adapter was trained.

    Attributes:
        steps: optimizer steps.
        stopped: whether it was stopped because its validation loss improved no more.
        dropped: optimizer step after which it was dropped, as the validation losses of others were lower; it is in
            `excluded.json` then.
        kept_step: the step whose weights were kept; null where those of the last step are.
        planned: optimizer steps that it was to be trained for.
        ended_by: what ended its training before; only there where something did, such as `trainer.max_time`.
        tokens: tokens that it saw; not there where the data module does not count them.
        scored: of these tokens, the ones that the loss was taken of.
        validation_loss: validation loss of the weights that were kept, or the last one before them.
    """

    steps: int
    stopped: bool
    kept_step: int | None
    dropped: NotRequired[int]
    planned: NotRequired[int]
    ended_by: NotRequired[str]
    tokens: NotRequired[int]
    scored: NotRequired[int]
    validation_loss: NotRequired[float]


def unfinished_text(row: TrainedRow) -> str | None:
    """Say of how many of how many steps an adapter is, and why; None if it had all, or was stopped as it no longer
    improved.

    Example:
        >>> unfinished_text({"steps": 98, "stopped": False, "kept_step": None, "planned": 1911, "ended_by": "a person"})
        '98 of 1,911 steps, ended by a person'
    """
    if "ended_by" not in row:
        return None
    return f"{row['steps']:,} of {row.get('planned', 0):,} steps, ended by {row['ended_by']}"


class ControlRecord(TypedDict):
    """Tell what a trained control stands for.

    Attributes:
        seeds: number of seeds that the run had when the control was trained.
    """

    seeds: int


#: By adapter.
TRAINED = JSONFile(TRAINED_NAME, dict[str, TrainedRow])
#: By adapter the reason why it was left out.
EXCLUDED = JSONFile(EXCLUDED_NAME, dict[str, str])
#: In the folder of a control.
CONTROL = JSONFile(CONTROL_NAME, ControlRecord, indent=None)
