"""Advise which adapter to use: what validation rows and test items say, in sentences. No other place decides it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from seedlora.names import BASE, FUSED, SOUP
from seedlora.records.report import Advice
from seedlora.records.selection import Selection
from seedlora.scores.intervals import FEWEST
from seedlora.scores.results import Results
from seedlora.scores.wording import LOSS, PERCENT, POINTS, NumberFormat, difference_in_points

_CHANGE = NumberFormat(1, "+.3f")


@dataclass(frozen=True)
class _Vote:
    """Hold what one measure says of another adapter: a clause, and whether the fused adapter is better."""

    clause: str
    fused_is_better: bool


def advise(
    selection: Selection | None,
    results: Results | None,
    seeds: Sequence[str],
    *,
    method: str | None,
    merged: str | None,
) -> Advice:
    """Say whether training helped, which adapter to use, and how sure that is.

    Args:
        selection: what the validation rows said.
        results: what the test said.
        seeds: labels that are single seeds, those that are trained.
        method: that fused.
        merged: label of what was made of the seeds: ``fused``, or ``soup`` for plain soup; None if nothing was.

    Returns:
        What :func:`compare_fused` says, and besides: what to ``use``, its ``folder``, and the ``headline``. That is the
        fused adapter unless another is shown to be better, or the base model where training is shown to have harmed. If
        nothing was merged it is the seed that gets most of the test items.
    """
    found = compare_fused(selection, results, seeds, method=method)
    use = found["better"] or merged or _best_seed(results, seeds)
    if use is None:
        return {"use": None, "folder": None, "headline": ["Nothing was trained."], **found}
    helped = _against_base(results, use, one_seed=len(seeds) == 1)
    if helped.harmed:
        return {"use": BASE, "folder": None, "headline": [helped.sentence, "Use the base model."], **found}
    folder = FUSED if use == merged else use
    why = _why(folder, found, results, merged=merged, seeds=seeds)
    return {"use": use, "folder": folder, "headline": [helped.sentence, why], **found}


def _best_seed(results: Results | None, seeds: Sequence[str]) -> str | None:
    """Return the seed that gets most of the test items; without a test the first."""
    if results is None or not seeds:
        return next(iter(seeds), None)
    return max(seeds, key=lambda seed: results.scores[seed].value if seed in results.scores else -1.0)


class _BaseVerdict(NamedTuple):
    """Hold whether training helped, in a sentence, and whether it is shown to have harmed."""

    sentence: str
    harmed: bool = False


def _against_base(results: Results | None, use: str, *, one_seed: bool) -> _BaseVerdict:
    """Say whether training helped."""
    if results is None:
        return _BaseVerdict("There was no test, so it is not known whether training helped.")
    label = FUSED if use not in results.items and one_seed else use
    n = next(iter(results.scores.values())).n
    if all(score.value == 0 for score in results.scores.values()):
        return _BaseVerdict(f"Nobody got anything right: 0 of {n} items for all, so no adapter is told from another.")
    if label not in results.items or BASE not in results.items:
        return _BaseVerdict("The base model was not tested beside it, so it is not known whether training helped.")
    difference = results.difference(label, BASE)
    before, after = (PERCENT(results.scores[name].value) for name in (BASE, label))
    scores = f"{before} of the base model, {after} of {label}"
    by = f"{difference_in_points(difference.value, difference.low, difference.high)}, n = {n}"
    if n < FEWEST:
        return _BaseVerdict(f"{n} test items are too few to say whether training helped: {scores}.")
    if not difference.shown:
        return _BaseVerdict(f"It is not shown that training helped: {scores}; {by}.")
    if difference.value < 0:
        return _BaseVerdict(f"Training harmed: {scores}; {by}.", harmed=True)
    return _BaseVerdict(f"Training helped: {scores}; {by}.")


def _why(folder: str, found: Advice, results: Results | None, *, merged: str | None, seeds: Sequence[str]) -> str:
    """Say what to use, and how sure that is."""
    what = f"Use {folder}"
    if found["better"] is not None:
        return f"{what}: it is shown to be better than the fused adapter."
    if merged is None and len(seeds) > 1:
        picked = (
            "the seed that gets most of these items, which flatters it" if results is not None else "the first seed"
        )
        return f"{what}: nothing was merged, and it is {picked}."
    if len(seeds) == 1:
        return f"{what}: one seed was trained."
    if found["sentences"]:
        return f"{what}: validation and test disagree, see below."
    if results is None:
        return f"{what}: no other adapter of the run is shown to be better on validation rows."
    n = next(iter(results.scores.values())).n
    surely = "" if n >= FEWEST else f"; {n} items are too few to say more"
    return f"{what}: no other adapter of the run is shown to be better{surely}."


def compare_fused(
    selection: Selection | None, results: Results | None, seeds: Sequence[str], *, method: str | None
) -> Advice:
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
