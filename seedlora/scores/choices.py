"""Say how sure a choice on validation rows is: the chosen against the next best, on the same rows."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from seedlora.records.selection import ChoiceRecord, LossDifference, Selection
from seedlora.scores.intervals import is_finite, loss_difference, paired_difference
from seedlora.scores.row_scores import RowScores
from seedlora.scores.wording import LOSS_CHANGE, POINTS, interval_text


def choice_record(what: str, chosen: str, scores: Mapping[str, RowScores], *, by: str) -> ChoiceRecord | None:
    """Compare what was chosen with the next best; None where there was nothing else that differs.

    Args:
        what: that was chosen, for people.
        chosen: the name of the best.
        scores: of all that it was chosen among.
        by: the lowest ``loss``, or most exact matches (``match``).
    """
    best = scores[chosen]
    others = {
        name: rows
        for name, rows in scores.items()
        if name != chosen and is_finite(rows) and not torch.equal(rows.losses, best.losses)
    }
    if not others or not is_finite(best):
        return None
    next_best = min(others, key=lambda name: (-others[name].match if by == "match" else 0.0, others[name].loss))
    difference = _difference(best, others[next_best], by)
    sentence = _sentence(f"{chosen} was chosen as {what}", f"{next_best}, the next", difference, by)
    return {"what": what, "chosen": chosen, "next": next_best, "difference": difference, "sentence": sentence}


def _difference(a: RowScores, b: RowScores, by: str) -> LossDifference:
    if by == "loss":
        return loss_difference(a, b)
    found = paired_difference(a.correct.numpy(), b.correct.numpy())
    return {"value": found.value, "low": found.low, "high": found.high, "n": found.n, "shown": found.shown}


def choice_sentences(selection: Selection | None) -> list[str]:
    """Say what was chosen on how many validation rows, and whether that is more than their noise."""
    return [] if selection is None else [each["sentence"] for each in selection.get("choices", ())]


def _sentence(chosen: str, other: str, row: LossDifference, by: str) -> str:
    number, unit = (LOSS_CHANGE, "nats per token") if by == "loss" else (POINTS, "points")
    noise = "" if row["shown"] else ", which is within the noise of these rows"
    against = f"{number(row['value'])} {unit} against {other} ({interval_text(row['low'], row['high'], number)})"
    return f"On {row['n']:,} validation rows {chosen}: {against}{noise}."
