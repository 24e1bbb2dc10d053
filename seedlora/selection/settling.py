"""Settle on validation rows what a run compares: choose the rule, tune the controls, measure the outcome.

Pure functions of adapters and of how they are scored; when they are called is the callback's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from seedlora.merge.bound_rule import BoundRule
from seedlora.merge.layers import merge_stacks
from seedlora.merge.registry import make_rule
from seedlora.names import AUTO, AUTO_GAIN, FUSED, GAIN_SEED, GAIN_SOUP, GREEDY, SOUP
from seedlora.records.selection import CandidateRecord, ChoiceRecord, Controls, NamedRule, Selection, SubsetRecord
from seedlora.scores.choices import choice_record
from seedlora.scores.intervals import is_finite, loss_difference
from seedlora.scores.row_scores import RowScores
from seedlora.selection.candidates import SCALES, any_method, gain_family, scaled_soups, seed_times_gain, subsets
from seedlora.selection.choice import (
    Score,
    choose,
    describe_rule,
    greedy_soup,
    score_lazily,
    score_rules,
    soup_of,
)
from seedlora.selection.comparison import Comparison
from seedlora.updates.dense import Updates
from seedlora.updates.factors import LoRAFactors
from seedlora.updates.stacks import Layers, Stacks, full_weights, select_adapters

#: Adapters in a forward while choosing: in bfloat16 those beside change a loss a little, by 0.003 on 203 tokens once.
ALONE = 1


@dataclass(frozen=True)
class Settled:
    """Hold what the validation rows decided.

    Args:
        rule: that the seeds are merged by.
        selection: what was found on the way, for ``selection.json``.
    """

    rule: BoundRule
    selection: Selection


@dataclass(frozen=True)
class RuleChoice:
    """Hold the choice among several rules.

    Args:
        rules: by name; none where nothing is to be chosen.
        scores: of what they make, by name.
        best: the name of the best; ``None`` where nothing is to be chosen.
    """

    rules: Mapping[str, BoundRule]
    scores: Mapping[str, RowScores]
    best: str | None

    def records(self) -> list[CandidateRecord]:
        """Return each rule with its scores, as plain data; those without a finite loss are left out."""
        return [
            {**_name_rule(name, rule), "loss": self.scores[name].loss, "match": self.scores[name].match}
            for name, rule in self.rules.items()
            if is_finite(self.scores[name])
        ]


def candidates(comparison: Comparison, paths: Sequence[str], n: int) -> dict[str, BoundRule]:
    """Return the rules to choose from, but for the greedy soup; none if nothing is to be chosen.

    Args:
        comparison: what was asked for.
        paths: of the layers.
        n: seeds.
    """
    if not comparison.chooses or n == 1 or comparison.merge == GREEDY:
        return {}
    return any_method(paths, n) if comparison.merge == AUTO else gain_family(paths, options=comparison.options)


def adapters_to_score(comparison: Comparison, paths: Sequence[str], n: int) -> int:
    """Return how many adapters :func:`settle` scores, at most."""
    tuned = len(SCALES) + 3 + 2 * len(_several(n)) if comparison.has_controls and n > 1 else 0
    greedy = 2 * n if comparison.wants_greedy else 0
    return n + 2 + len(candidates(comparison, paths, n)) + greedy + tuned


def settle(
    comparison: Comparison,
    stacks: Layers,
    seeds: Sequence[str],
    score: Score,
    *,
    others: Mapping[str, Callable[[], Layers]] | None = None,
) -> Settled:
    """Choose the rule if it is to be chosen, tune the controls, and compare the outcome with soup and seeds.

    Args:
        comparison: what was asked for; it merges.
        stacks: the seeds' adapters of every layer by path.
        seeds: their labels.
        score: of adapters on validation rows.
        others: adapters that are scored too, by label, and take no part in the choice; made when they are called.
    """
    n, by, lazily = len(seeds), comparison.select_by, partial(score_lazily, score=score, at_once=ALONE)
    scores = lazily({seed: partial(select_adapters, stacks, [i]) for i, seed in enumerate(seeds)})
    best_seed = choose({seed: scores[seed] for seed in seeds}, by=by)
    greedy = greedy_soup(stacks, score, by=by) if comparison.wants_greedy and n > 1 else None
    choice = _choose_rule(comparison, stacks, n, score, greedy)
    rule = comparison.rule if choice.best is None else choice.rules[choice.best]
    assert rule is not None
    fused = merge_stacks(stacks, rule)
    last: dict[str, Callable[[], Layers]] = {**(others or {}), FUSED: lambda: fused}
    if n > 1:
        last[SOUP] = partial(merge_stacks, stacks, make_rule("soup"))
    controls: Controls = {}
    tuned = RuleChoice({}, {}, None)
    if comparison.has_controls and n > 1:
        controls[GAIN_SEED] = {"seed": best_seed}
    if greedy is not None:
        controls[GREEDY] = {"members": list(greedy.options["members"])}
    if greedy is not None and comparison.compares_greedy:
        last[GREEDY] = partial(merge_stacks, stacks, greedy)
    if comparison.has_controls and greedy is not None:
        tuned = _tune_soup(stacks, n, score, by)
        assert tuned.best is not None
        controls[GAIN_SOUP] = {**_name_rule(tuned.best, tuned.rules[tuned.best]), "candidates": tuned.records()}
        scores[GAIN_SOUP] = tuned.scores[tuned.best]
        last[GAIN_SEED] = partial(seed_times_gain, stacks, fused, index=list(seeds).index(best_seed))
    scores |= lazily(last)
    scores[FUSED] = scores.pop(FUSED)  # last, for whoever reads the table
    rows = scores[seeds[0]]
    return Settled(
        rule,
        {
            "by": by,
            "not_finite": sorted(
                name for name, row in {**choice.scores, **tuned.scores, **scores}.items() if not is_finite(row)
            ),
            "rows": len(rows.tokens),
            "tokens": int(rows.tokens.sum()),
            "asked": comparison.method_name,
            "chosen": None if choice.best is None else _name_rule(choice.best, rule),
            "candidates": choice.records(),
            "best_seed": best_seed,
            "scores": {
                label: {"loss": row.loss, "match": row.match} for label, row in scores.items() if is_finite(row)
            },
            "against": {
                label: loss_difference(scores[FUSED], scores[label])
                for label in (best_seed, *([SOUP] if n > 1 else []))
                if is_finite(scores[FUSED]) and is_finite(scores[label])
            },
            "soup_gain": loss_difference(_mean_scores([scores[seed] for seed in seeds]), scores[SOUP])
            if n > 1 and all(is_finite(scores[label]) for label in (*seeds, SOUP))
            else None,
            "choices": _choices(comparison, choice, best_seed, seeds, scores),
            "controls": controls,
            "subsets": _score_subsets(stacks, seeds, rule, scores, score) if comparison.has_controls and n > 1 else [],
        },
    )


def _choices(
    comparison: Comparison, rule: RuleChoice, best_seed: str, seeds: Sequence[str], scores: Mapping[str, RowScores]
) -> list[ChoiceRecord]:
    """Compare what was chosen with what was next: the rule, the greedy soup with plain soup, the best replica."""
    by, known = comparison.select_by, {**rule.scores, **scores}
    found = [] if rule.best is None else [choice_record("the rule", rule.best, rule.scores, by=by)]
    if GREEDY in known and SOUP in known:
        found.append(choice_record("the greedy soup", GREEDY, {label: known[label] for label in (GREEDY, SOUP)}, by=by))
    if comparison.compares_greedy:
        found.append(choice_record("the best replica", best_seed, {seed: scores[seed] for seed in seeds}, by=by))
    return [each for each in found if each is not None]


def _mean_scores(rows: Sequence[RowScores]) -> RowScores:
    """Return the mean losses of several adapters, right where all of them are."""
    correct = torch.stack([row.correct for row in rows]).all(0)
    return RowScores(torch.stack([row.losses for row in rows]).double().mean(0), correct, rows[0].tokens)


def adapters_beside(
    comparison: Comparison,
    stacks: Mapping[str, Updates],
    seeds: Sequence[str],
    fused: Layers | None,
    selection: Selection | None,
) -> dict[str, Callable[[], Layers]]:
    """Return the adapters that are scored beside base, seeds, soup and fused one, by label, made when they are called.

    Args:
        comparison: what was asked for.
        stacks: the seeds' adapters of every layer by path.
        seeds: their labels.
        fused: the fused adapter, if there is one.
        selection: what :func:`settle` found; ``None`` without validation.
    """
    made: dict[str, Callable[[], Layers]] = {}
    if len(seeds) == 1:
        return made
    tuned: Controls = {} if selection is None else selection["controls"]
    if comparison.has_controls and GAIN_SEED in tuned and fused is not None:
        factors = Stacks(
            {path: stack for path, stack in stacks.items() if isinstance(stack, LoRAFactors)}, full_weights(stacks)
        )
        best = list(seeds).index(tuned[GAIN_SEED]["seed"])
        made[GAIN_SEED] = partial(seed_times_gain, factors, fused, index=best)
    if comparison.has_controls and GAIN_SOUP in tuned:
        control = tuned[GAIN_SOUP]
        made[GAIN_SOUP] = partial(merge_stacks, stacks, make_rule(control["method"], control["options"]))
    if GREEDY in tuned and comparison.compares_greedy:
        made[GREEDY] = partial(merge_stacks, stacks, soup_of(tuned[GREEDY]["members"]))
    for name, rule in comparison.compare.items():
        if rule is not None:
            made[name] = partial(merge_stacks, stacks, rule)
    return made


def _choose_rule(comparison: Comparison, stacks: Layers, n: int, score: Score, greedy: BoundRule | None) -> RuleChoice:
    """Score the rules to choose from, the greedy soup among them where it may be chosen, and choose."""
    rules = candidates(comparison, list(stacks), n)
    scores = score_rules(stacks, rules, score, at_once=ALONE)
    if greedy is not None and comparison.chooses and comparison.merge != AUTO_GAIN:
        rules[GREEDY] = greedy
        scores |= score_rules(stacks, {GREEDY: greedy}, score, at_once=ALONE)
    return RuleChoice(rules, scores, choose(scores, by=comparison.select_by) if rules else None)


def _tune_soup(stacks: Layers, n: int, score: Score, by: str) -> RuleChoice:
    """Choose among the multiples of soup."""
    soups = scaled_soups(n)
    scores = score_rules(stacks, soups, score, at_once=ALONE)
    return RuleChoice(soups, scores, choose(scores, by=by))


def _score_subsets(
    stacks: Layers, seeds: Sequence[str], rule: BoundRule, scores: Mapping[str, RowScores], score: Score
) -> list[SubsetRecord]:
    """Return the losses of soup and rule by the seeds fused; a rule whose options count the seeds is left out."""
    rules = {SOUP: make_rule("soup")}
    if not {"members", "weights", "scale"} & set(rule.options):
        rules[FUSED] = rule
    made = {
        f"{label} {chosen}": partial(_merge_members, stacks, chosen, one)
        for chosen in _several(len(seeds))
        for label, one in rules.items()
    }
    several = score_lazily(made, score, at_once=ALONE)
    rows: list[SubsetRecord] = []
    for chosen in subsets(len(seeds)):
        if len(chosen) == 1:
            losses = dict.fromkeys(rules, scores[seeds[chosen[0]]].loss)
        elif len(chosen) == len(seeds):
            losses = {label: scores[label].loss for label in rules}
        else:
            losses = {label: several[f"{label} {chosen}"].loss for label in rules}
        rows.append({"seeds": [seeds[i] for i in chosen], "loss": losses})
    return [row for row in rows if all(map(math.isfinite, row["loss"].values()))]


def _several(n: int) -> list[tuple[int, ...]]:
    """Return the subsets of more than one seed and less than all."""
    return [chosen for chosen in subsets(n) if 1 < len(chosen) < n]


def _merge_members(stacks: Layers, chosen: Sequence[int], rule: BoundRule) -> Layers:
    return merge_stacks(select_adapters(stacks, chosen), rule)


def _name_rule(name: str, rule: BoundRule) -> NamedRule:
    described = describe_rule(rule)
    return {"name": name, "method": described["method"], "options": described["options"]}
