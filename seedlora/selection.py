"""Ways to fuse one stack of seeds, the controls beside them, and the choice among them on validation data.

Pure functions: how adapters are scored is an argument, and nothing here knows of a test set.

Shape legend: ``N`` adapters, ``I`` validation rows.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any, TypeAlias

from jaxtyping import Bool, Float, Int
from torch import Tensor

from seedlora.factors import LoRAFactors
from seedlora.fuse import Stacks, full_weights, fuse
from seedlora.merge import COMMON, METHODS, BoundRule, bind, gain, greedy_search, weighted_sum

#: Below any score: what a loss that is no number counts as.
_WORST = -1e30
#: One adapter: ``N = 1`` factors by layer path; :class:`seedlora.fuse.Stacks` if it has full weights too.
Layers: TypeAlias = Mapping[str, LoRAFactors]

SELECT_BY = ("loss", "match")
#: Powers of :func:`seedlora.merge.seedlora_gain` that are tried; 0 is soup.
POWERS = (0.25, 0.5, 0.75, 1.0, 1.25)
#: Factors on the soup that are tried; 1 is soup.
SCALES = (0.6, 0.8, 1.2, 1.4, 1.6, 2.0)
#: Methods that :func:`any_method` tries at their defaults, beside the gain family and the scaled soups.
TRIED = ("seedlora", "model_stock", "karcher", "ties", "dare_ties", "knots_ties")


@dataclass(frozen=True, eq=False)
class RowScores:
    """What one adapter says about the same rows as the others.

    Args:
        losses: negative log-likelihood of each row's response, summed over its tokens, in nats.
        correct: whether greedy decoding gives the response exactly.
        tokens: of each response.
    """

    losses: Float[Tensor, " I"]
    correct: Bool[Tensor, " I"]
    tokens: Int[Tensor, " I"]

    @property
    def loss(self) -> float:
        """Nats per token over all rows."""
        return float(self.losses.double().sum() / self.tokens.sum())

    @property
    def match(self) -> float:
        """Share of rows answered exactly."""
        return float(self.correct.double().mean())

    def __getitem__(self, rows: slice) -> RowScores:
        """What it says about some of the rows."""
        return RowScores(self.losses[rows], self.correct[rows], self.tokens[rows])


#: Scores adapters, given by name, on the same rows. It is handed a few at a time, so that memory stays bounded.
Score: TypeAlias = Callable[[Mapping[str, Layers]], Mapping[str, RowScores]]


# Candidates


def gain_family(
    paths: Sequence[str], *, powers: Sequence[float] = POWERS, options: Mapping[str, Any] | None = None
) -> dict[str, BoundRule]:
    """Soup, and :func:`seedlora.merge.seedlora_gain` with each power: on all layers, on attention or on FFN alone.

    Args:
        paths: of the layers; where all are of one kind, there are no parts of them to try.
        powers: to try.
        options: of the rule, besides ``p``; if they name ``layers``, these alone are tried.
    """
    options = dict(options or {})
    found = {"soup": bind("soup", {key: value for key, value in options.items() if key in COMMON})}
    for layers in ("all", "attention", "ffn"):
        use = {} if layers == "all" else {"layers": layers, "rest": "soup"}
        if use and ("layers" in options or not 0 < sum(map(bind("soup", use).selects, paths)) < len(paths)):
            continue
        for p in powers:
            name = f"seedlora_gain p={p:g}" + (f" on {layers}" if use else "")
            found[name] = bind("seedlora_gain", {**options, "p": p, **use})
    return found


def scaled_soups(n: int, *, scales: Sequence[float] = SCALES) -> dict[str, BoundRule]:
    """Soup and its multiples: the control of every rule that changes the length of the average.

    Args:
        n: adapters that are averaged.
        scales: to try.
    """
    multiples = {f"soup x {scale:g}": bind("task_arithmetic", {"scale": scale / n}) for scale in scales}
    return {"soup": bind("soup"), **multiples}


def any_method(paths: Sequence[str], n: int) -> dict[str, BoundRule]:
    """The gain family, the scaled soups, and the methods of :data:`TRIED` as they are."""
    return {**gain_family(paths), **scaled_soups(n), **{name: bind(name) for name in TRIED}}


def seed_times_gain(stacks: Layers, fused: Layers, *, index: int) -> Stacks[LoRAFactors]:
    r"""One adapter, made as much longer in each layer as the fused one is than the mean of all.

    .. math:: \Delta = \frac{\|\Delta_\text{fused}\|}{\|\bar\Delta\|} \Delta_i

    What a fused adapter gains by its length alone, this control gains too. Full weights are the adapter's own.

    Args:
        stacks: the adapters of every layer by path.
        fused: what was made of them.
        index: of the adapter to take.
    """
    found = {
        path: weighted_sum(LoRAFactors(stack.A[[index]], stack.B[[index]]), gain(stack, fused[path])[None])
        for path, stack in stacks.items()
    }
    return Stacks(found, {key: [each[index]] for key, each in full_weights(stacks).items()})


def members(stacks: Layers, chosen: Sequence[int]) -> Stacks[LoRAFactors]:
    """The chosen adapters of every layer."""
    index = list(chosen)
    return Stacks(
        {path: LoRAFactors(stack.A[index], stack.B[index]) for path, stack in stacks.items()},
        {key: [each[i] for i in index] for key, each in full_weights(stacks).items()},
    )


def subsets(n: int, *, most: int = 10) -> list[tuple[int, ...]]:
    """Subsets of ``range(n)`` of every size from 1: all of a size, or ``most`` of them, always the same."""
    found = []
    for size in range(1, n + 1):
        if math.comb(n, size) <= most:
            found += list(combinations(range(n), size))
            continue
        drawn: set[tuple[int, ...]] = set()
        generator = random.Random(size)  # noqa: S311 - not for secrets
        while len(drawn) < most:
            drawn.add(tuple(sorted(generator.sample(range(n), size))))
        found += sorted(drawn)
    return found


# Scores and the choice


def score_rules(stacks: Layers, rules: Mapping[str, BoundRule], score: Score, *, at_once: int) -> dict[str, RowScores]:
    """Fuse by each rule and score the results, ``at_once`` of them held at a time.

    Costs ``len(rules)`` fusions and, in the forward passes of ``score``, the rows once per rule.
    """
    return score_lazily({name: partial(fuse, stacks, rule) for name, rule in rules.items()}, score, at_once=at_once)


def score_lazily(adapters: Mapping[str, Callable[[], Layers]], score: Score, *, at_once: int) -> dict[str, RowScores]:
    """Make adapters and score them, ``at_once`` of them held at a time."""
    found: dict[str, RowScores] = {}
    names = list(adapters)
    for start in range(0, len(names), at_once):
        found |= score({name: adapters[name]() for name in names[start : start + at_once]})
    return found


def choose(scores: Mapping[str, RowScores], *, by: str = "loss") -> str:
    """The name of the best: lowest loss, or most exact matches with the loss deciding ties; the first of equals.

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
        raise ValueError(f"Unknown ensemble.select_by '{by}'; choose one of {', '.join(SELECT_BY)}")


def greedy_soup(stacks: Layers, score: Score, *, by: str = "loss") -> BoundRule:
    """The soup of the adapters that do not make the validation score worse, best first, as a rule.

    Costs at most ``2 * N - 1`` calls of ``score``; see :func:`seedlora.merge.greedy_soup`.
    """
    check_select_by(by)

    def larger_is_better(chosen: Sequence[int]) -> float:
        (found,) = score({"greedy_soup": fuse(stacks, soup_of(chosen))}).values()
        if by == "match":
            return found.match
        return -found.loss if math.isfinite(found.loss) else _WORST

    return soup_of(greedy_search(len(next(iter(stacks.values()))), larger_is_better))


def soup_of(chosen: Sequence[int]) -> BoundRule:
    """The greedy soup as a rule of one layer, once its members are known."""
    return bind(replace(METHODS["greedy_soup"], surveys={}), {"members": list(chosen)})


def described(rule: BoundRule) -> dict[str, Any]:
    """Method and options of a rule as plain data."""
    use = {key: value for key, value in asdict(rule.use).items() if value != getattr(type(rule.use)(), key)}
    return {"method": rule.name, "options": {**rule.options, **use}}
