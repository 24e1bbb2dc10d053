"""Score candidates on validation rows and choose."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import TypeAlias

from seedlora.merge.bound_rule import BoundRule
from seedlora.merge.layers import merge_stacks
from seedlora.merge.methods.soup import greedy_search
from seedlora.merge.registry import METHODS, make_rule
from seedlora.records.selection import RuleRecord
from seedlora.scores.row_scores import RowScores
from seedlora.updates.stacks import Layers
from seedlora.utils.options import name_option

#: Below any score: what a loss that is no number counts as.
_WORST = -1e30
SELECT_BY = ("loss", "match")
#: Scores adapters, given by name, on the same rows. It is handed a few at a time, so that memory stays bounded.
Score: TypeAlias = Callable[[Mapping[str, Layers]], Mapping[str, RowScores]]


def score_rules(stacks: Layers, rules: Mapping[str, BoundRule], score: Score, *, at_once: int) -> dict[str, RowScores]:
    """Merge by each rule and score the results, ``at_once`` of them held at a time.

    Costs ``len(rules)`` merges and, in the forward passes of ``score``, the rows once per rule.
    """
    return score_lazily(
        {name: partial(merge_stacks, stacks, rule) for name, rule in rules.items()}, score, at_once=at_once
    )


def score_lazily(adapters: Mapping[str, Callable[[], Layers]], score: Score, *, at_once: int) -> dict[str, RowScores]:
    """Make adapters and score them, ``at_once`` of them held at a time."""
    found: dict[str, RowScores] = {}
    names = list(adapters)
    for start in range(0, len(names), at_once):
        found |= score({name: adapters[name]() for name in names[start : start + at_once]})
    return found


def choose(scores: Mapping[str, RowScores], *, by: str = "loss") -> str:
    """Return the name of the best: lowest loss, or most exact matches with the loss deciding ties.

    Of equals it is the first.

    Args:
        scores: on validation rows. Losses that are not finite lose.
        by: ``loss`` or ``match``.

    Raises:
        ValueError: for an unknown ``by``, or if no loss is finite.
    """
    check_select_by(by)
    finite = {name: found for name, found in scores.items() if math.isfinite(found.loss)}
    if not finite:
        raise ValueError(
            f"none of {', '.join(scores) or 'nothing'} has a finite validation loss; nothing can be chosen"
        )
    if by == "loss":
        return min(finite, key=lambda name: finite[name].loss)
    return min(finite, key=lambda name: (-finite[name].match, finite[name].loss))


def check_select_by(by: str) -> None:
    """Raise ValueError unless it is one of :data:`SELECT_BY`."""
    if by not in SELECT_BY:
        raise ValueError(f"Unknown {name_option('ensemble.select_by')} '{by}'; choose one of {', '.join(SELECT_BY)}")


def greedy_soup(stacks: Layers, score: Score, *, by: str = "loss") -> BoundRule:
    """Return the soup of the adapters that do not make the validation score worse, best first, as a rule.

    Costs at most ``2 * N - 1`` calls of ``score``; see :func:`seedlora.merge.methods.soup.greedy_soup`.
    """
    check_select_by(by)

    def larger_is_better(chosen: Sequence[int]) -> float:
        (found,) = score({"greedy_soup": merge_stacks(stacks, soup_of(chosen))}).values()
        if by == "match":
            return found.match
        return -found.loss if math.isfinite(found.loss) else _WORST

    return soup_of(greedy_search(len(next(iter(stacks.values()))), larger_is_better))


def soup_of(chosen: Sequence[int]) -> BoundRule:
    """Return the greedy soup as a rule of one layer, once its members are known."""
    return make_rule(replace(METHODS["greedy_soup"], surveys={}), {"members": list(chosen)})


def describe_rule(rule: BoundRule) -> RuleRecord:
    """Return the method and the options of a rule as plain data."""
    use = {key: value for key, value in asdict(rule.common).items() if value != getattr(type(rule.common)(), key)}
    return {"method": rule.name, "options": {**rule.options, **use}}
