"""Advise whether the fused adapter is the one to use: what validation rows and test items say, in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from seedlora.names import FUSED, SOUP
from seedlora.records.report import Advice
from seedlora.records.selection import Selection
from seedlora.scores.results import Results
from seedlora.scores.wording import LOSS, PERCENT, POINTS, NumberFormat

_CHANGE = NumberFormat(1, "+.3f")


@dataclass(frozen=True)
class _Vote:
    """Hold what one measure says of another adapter: a clause, and whether the fused adapter is better."""

    clause: str
    fused_is_better: bool


def advice(selection: Selection | None, results: Results | None, seeds: Sequence[str], *, method: str | None) -> Advice:
    """Compare the fused adapter with soup, and with the seed that validation found best.

    A seed picked by the test items would be flattered by them, so without validation no seed is judged.

    Args:
        selection: what the validation rows said.
        results: what the test said.
        seeds: labels that are single seeds.
        method: that fused.

    Returns:
        The sentences, and the label of the adapter that is ``better`` than the fused one: shown so by one of loss and
        test, and not the opposite by the other; of two, the one with the lower validation loss. ``None`` if there is
        none.
    """
    label = FUSED if results is None or FUSED in results.items else SOUP
    best = None if selection is None else selection["best_seed"]
    sentences: list[str] = []
    better: list[str] = []
    for other in (SOUP, best):
        if other is None or other == label or (other in seeds and len(seeds) == 1):
            continue
        name = "soup" if other == SOUP else f"{other}, the best seed of the validation rows"
        votes = [vote for vote in (_by_loss(selection, other), _by_test(results, label, other)) if vote is not None]
        clauses = [vote.clause for vote in votes]
        if all(vote.fused_is_better for vote in votes):
            continue
        if any(vote.fused_is_better for vote in votes):
            sentences.append(f"Against {name}, {' but '.join(clauses)}: choose by what you need.")
        else:
            better.append(other)
            sentences.append(f"The fused adapter ({method}) is worse than {name}: {' and '.join(clauses)}.")
    losses = {} if selection is None else {name: score["loss"] for name, score in selection["scores"].items()}
    return {
        "sentences": sentences,
        "better": min(better, key=lambda other: losses.get(other, np.inf), default=None),
    }


def _by_loss(selection: Selection | None, other: str) -> _Vote | None:
    """Return what the validation rows show, if they show anything."""
    row = None if selection is None else selection["against"].get(other)
    if selection is None or row is None or not row["shown"]:
        return None
    fused, others = (selection["scores"][label]["loss"] for label in (FUSED, other))
    interval = _CHANGE.between(row["low"], row["high"])
    return _Vote(
        f"its validation loss is {LOSS(fused)} against {LOSS(others)} "
        f"({_CHANGE(row['value'])}, {interval}, n = {row['n']})",
        fused_is_better=row["value"] < 0,
    )


def _by_test(results: Results | None, label: str, other: str) -> _Vote | None:
    """Return what the test items show, if they show anything."""
    if results is None or label not in results.items or other not in results.items:
        return None
    difference = results.difference(label, other)
    if not difference.shown:
        return None
    return _Vote(
        f"it gets {PERCENT(abs(difference.value))} points {'more' if difference.value > 0 else 'less'} of the test "
        f"items ({POINTS.between(difference.low, difference.high)}, n = {difference.n})",
        fused_is_better=difference.value > 0,
    )
