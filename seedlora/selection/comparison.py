"""What a run compares its seeds with: the merge rule, other methods, controls; and what validation says of them.

Pure functions of adapters and of how they are scored; when they are called is the callback's business.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from seedlora.merge.bound_rule import BoundRule, MergeRule
from seedlora.merge.layers import fuse
from seedlora.merge.registry import METHODS, make_rule
from seedlora.names import (
    ALL_CONTROLS,
    FUSED,
    GAIN_SEED,
    GAIN_SOUP,
    GREEDY,
    NO_CONTROLS,
    SOUP,
    UNTRAINED,
    nothing_for_one_seed,
)
from seedlora.scores.intervals import is_finite, loss_difference
from seedlora.scores.row_scores import RowScores
from seedlora.selection.candidates import SCALES, any_method, gain_family, scaled_soups, seed_times_gain, subsets
from seedlora.selection.choice import (
    Score,
    check_select_by,
    choose,
    describe_rule,
    greedy_soup,
    score_lazily,
    score_rules,
    soup_of,
)
from seedlora.updates.dense import Updates
from seedlora.updates.factors import LoRAFactors
from seedlora.updates.stacks import Layers, Stacks, full_weights, select_adapters

AUTO, GAIN, NO_MERGE = "auto", "seedlora_gain", "none"
#: Adapters in a forward while choosing: in bfloat16 those beside change a loss a little, by 0.003 on 203 tokens once.
ALONE = 1
#: Training rows at most on which all that was tested is scored.
TRAIN_ROWS = 128
CONTROLS = (NO_CONTROLS, UNTRAINED, ALL_CONTROLS)


class Comparison:
    """The merge rule of a run and what it is measured against, bound and checked before anything is trained.

    Args:
        merge: a method of :data:`seedlora.merge.registry.METHODS` or any rule; ``none`` fuses nothing. ``auto`` chooses
            among :func:`seedlora.selection.candidates.any_method`, ``seedlora_gain`` without ``p`` among
            :func:`seedlora.selection.candidates.gain_family`, and ``greedy_soup`` its members, all on validation rows.
        options: keyword options of the method.
        compare: further methods, scored on the same test items.
        compare_options: keyword options of these, by method.
        controls: ``untrained`` adds one seed times the gain of the fused adapter, the soup times the factor that is
            best on validation rows, the greedy soup, and the mean of the seeds' probabilities; ``all`` trains two more
            adapters, see :class:`seedlora.callbacks.seed_ensemble.SeedEnsembleCallback`.
        select_by: what is best on validation rows: the lowest ``loss``, or most exact matches (``match``).

    Raises:
        ValueError: for an unknown method, option or control.
    """

    def __init__(
        self,
        merge: str | MergeRule = "seedlora",
        options: Mapping[str, Any] | None = None,
        *,
        compare: Sequence[str] = (),
        compare_options: Mapping[str, Mapping[str, Any]] | None = None,
        controls: str = NO_CONTROLS,
        select_by: str = "loss",
    ) -> None:
        self.merge, self.options, self.select_by = merge, dict(options or {}), select_by
        self.controls = controls
        check_select_by(select_by)
        if controls not in CONTROLS:
            raise ValueError(f"Unknown ensemble.controls '{controls}'; choose one of {', '.join(CONTROLS)}")
        if merge == AUTO and self.options:
            raise ValueError(f"Merge method '{AUTO}' chooses the options too; it takes none, got {self.options}")
        missing = {GAIN: "p", GREEDY: "score"}.get(merge) if isinstance(merge, str) else None
        self.chooses = merge == AUTO or (missing is not None and missing not in self.options)
        #: The rule; where it is to be chosen, what stands for it until then.
        self.rule: BoundRule | None = None
        try:
            if self.chooses:
                gain_family((), options=self.options) if merge == GAIN else make_rule("soup", self.options)
                self.rule = make_rule("soup")
            elif merge != NO_MERGE:
                self.rule = make_rule(merge, self.options)
        except ValueError as error:
            others = "" if merge in METHODS else f" ('{NO_MERGE}' fuses nothing, '{AUTO}' chooses)"
            raise ValueError(f"{error}{others}") from None
        self.compare = self._bound(compare, compare_options or {})
        if self.rule is None and (self.has_controls or GREEDY in self.compare):
            asked = "ensemble.controls" if self.has_controls else "ensemble.compare greedy_soup"
            raise ValueError(f"{asked} is tuned where seeds are fused, and ensemble.merge '{NO_MERGE}' fuses nothing")

    def _bound(self, names: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> dict[str, BoundRule | None]:
        """The methods to compare; None is the greedy soup, whose members validation says. Soup is compared anyway."""
        if unknown := sorted(set(options) - set(names)):
            raise ValueError(f"ensemble.compare_options names {unknown[0]}, which ensemble.compare does not")
        if repeated := sorted({name for name in names if list(names).count(name) > 1}):
            raise ValueError(f"ensemble.compare names {repeated[0]} more than once")
        bound: dict[str, BoundRule | None] = {}
        for name in names:
            given = dict(options.get(name, {}))
            same = name == self.merge and given == self.options and not self.chooses
            if same or (name == SOUP and not given):
                continue
            bound[name] = None if name == GREEDY else make_rule(name, given)
        return bound

    def of_seeds(self, kept: Sequence[int]) -> Comparison:
        """The same among some of the seeds, given by their places: see :func:`rule_of_seeds`."""
        found = copy.copy(self)
        found.rule = rule_of_seeds(self.rule, kept)
        found.compare = {name: rule_of_seeds(rule, kept) for name, rule in self.compare.items()}
        return found

    @property
    def method_name(self) -> str:
        """The merge method, for people."""
        return self.merge if isinstance(self.merge, str) else getattr(self.merge, "__name__", repr(self.merge))

    @property
    def has_controls(self) -> bool:
        """Whether any control was asked for."""
        return self.controls != NO_CONTROLS

    @property
    def validated_for(self) -> str | None:
        """The option that needs validation rows, if one does."""
        if self.chooses:
            return f"--merge {self.merge}" + (" without ensemble.merge_options p" if self.merge == GAIN else "")
        if self.has_controls:
            return "ensemble.controls"
        return "ensemble.compare greedy_soup" if GREEDY in self.compare else None

    def nothing_for(self, n: int) -> str | None:
        """What was asked for and does nothing with so many seeds, in a sentence."""
        options = {f"--merge {self.merge}": self.chooses, "--compare": self.compare, "--controls": self.has_controls}
        return nothing_for_one_seed(options) if n == 1 else None

    def lacks(self, selection: Mapping[str, Any]) -> str | None:
        """What is to be compared and was not settled on validation rows when the seeds were fused."""
        settled = selection.get("controls") or {}
        if self.has_controls and not settled:
            return "controls"
        return GREEDY if GREEDY in self.compare and GREEDY not in settled else None

    @property
    def is_soup(self) -> bool:
        """Whether the fused adapter is the plain soup, which then has no second name."""
        return self.merge == SOUP and not self.options

    @property
    def _wants_greedy(self) -> bool:
        return self.merge in (AUTO, GREEDY) or GREEDY in self.compare or self.has_controls

    def candidates(self, paths: Sequence[str], n: int) -> dict[str, BoundRule]:
        """The rules to choose from, but for the greedy soup; none if nothing is to be chosen.

        Args:
            paths: of the layers.
            n: seeds.
        """
        if not self.chooses or n == 1 or self.merge == GREEDY:
            return {}
        return any_method(paths, n) if self.merge == AUTO else gain_family(paths, options=self.options)

    def adapters_to_score(self, paths: Sequence[str], n: int) -> int:
        """How many adapters :meth:`settle` scores, at most."""
        tuned = len(SCALES) + 3 + 2 * len(_several(n)) if self.has_controls and n > 1 else 0
        return n + 2 + len(self.candidates(paths, n)) + (2 * n if self._wants_greedy else 0) + tuned

    def settle(self, stacks: Layers, seeds: Sequence[str], score: Score) -> tuple[BoundRule, dict[str, Any]]:
        """Choose the rule if it is to be chosen, tune the controls, and compare the outcome with soup and seeds.

        Args:
            stacks: the seeds' adapters of every layer by path.
            seeds: their labels.
            score: of adapters on validation rows.

        Returns:
            The rule, and what was found on the way as plain data: ``candidates`` with their scores and the one
            ``chosen``; the names of all whose loss is ``not_finite``; ``scores`` by label; ``against``: loss of the
            fused adapter minus that of soup and of the best seed, in nats per token with a bootstrap interval over
            rows; the ``controls`` as they were tuned; and the losses of soup and rule over ``subsets`` of the seeds.
        """
        assert self.rule is not None
        n, by, lazily = len(seeds), self.select_by, partial(score_lazily, score=score, at_once=ALONE)
        found = lazily({seed: partial(select_adapters, stacks, [i]) for i, seed in enumerate(seeds)})
        best_seed = choose({seed: found[seed] for seed in seeds}, by=by)
        rules = self.candidates(list(stacks), n)
        scores = score_rules(stacks, rules, score, at_once=ALONE)
        tuned: dict[str, RowScores] = {}
        controls: dict[str, Any] = {GAIN_SEED: {"seed": best_seed}} if self.has_controls and n > 1 else {}
        if self._wants_greedy and n > 1:
            greedy = greedy_soup(stacks, score, by=by)
            controls[GREEDY] = {"members": list(greedy.options["members"])}
            if self.chooses and self.merge != GAIN:
                rules[GREEDY] = greedy
                scores |= score_rules(stacks, {GREEDY: greedy}, score, at_once=1)
        chosen = choose(scores, by=by) if rules else None
        rule = self.rule if chosen is None else rules[chosen]
        fused = fuse(stacks, rule)
        last: dict[str, Callable[[], Layers]] = {FUSED: lambda: fused}
        if n > 1:
            last[SOUP] = partial(fuse, stacks, make_rule("soup"))
        if self.has_controls and n > 1:
            soups = scaled_soups(n)
            tuned = score_rules(stacks, soups, score, at_once=ALONE)
            best = choose(tuned, by=by)
            controls[GAIN_SOUP] = {"name": best, **describe_rule(soups[best]), "candidates": _rows(soups, tuned)}
            found[GAIN_SOUP] = tuned[best]
            last[GAIN_SEED] = partial(seed_times_gain, stacks, fused, index=list(seeds).index(best_seed))
            last[GREEDY] = partial(fuse, stacks, soup_of(controls[GREEDY]["members"]))
        found |= lazily(last)
        found[FUSED] = found.pop(FUSED)  # last, for whoever reads the table
        first = found[seeds[0]]
        others = [best_seed, *([SOUP] if n > 1 else [])]
        return rule, {
            "by": by,
            "not_finite": sorted(name for name, row in {**scores, **tuned, **found}.items() if not is_finite(row)),
            "rows": len(first.tokens),
            "tokens": int(first.tokens.sum()),
            "asked": self.method_name,
            "chosen": None if chosen is None else {"name": chosen, **describe_rule(rule)},
            "candidates": _rows(rules, scores),
            "best_seed": best_seed,
            "scores": {label: {"loss": row.loss, "match": row.match} for label, row in found.items() if is_finite(row)},
            "against": {
                label: loss_difference(found[FUSED], found[label])
                for label in others
                if is_finite(found[FUSED]) and is_finite(found[label])
            },
            "controls": controls,
            "subsets": self._subsets(stacks, seeds, rule, found, score) if self.has_controls and n > 1 else [],
        }

    def _subsets(
        self, stacks: Layers, seeds: Sequence[str], rule: BoundRule, found: Mapping[str, RowScores], score: Score
    ) -> list[dict[str, Any]]:
        """Validation loss of soup and rule by the seeds fused; a rule whose options count the seeds is left out."""
        rules = {SOUP: make_rule("soup")}
        if not {"members", "weights", "scale"} & set(rule.options):
            rules[FUSED] = rule
        made = {
            f"{label} {chosen}": partial(_fused_members, stacks, chosen, one)
            for chosen in _several(len(seeds))
            for label, one in rules.items()
        }
        scores = score_lazily(made, score, at_once=ALONE)
        rows: list[dict[str, Any]] = []
        for chosen in subsets(len(seeds)):
            if len(chosen) == 1:
                losses = dict.fromkeys(rules, found[seeds[chosen[0]]].loss)
            elif len(chosen) == len(seeds):
                losses = {label: found[label].loss for label in rules}
            else:
                losses = {label: scores[f"{label} {chosen}"].loss for label in rules}
            rows.append({"seeds": [seeds[i] for i in chosen], "loss": losses})
        return [row for row in rows if all(map(math.isfinite, row["loss"].values()))]

    def beside(
        self, stacks: Mapping[str, Updates], seeds: Sequence[str], fused: Layers | None, record: Mapping[str, Any]
    ) -> dict[str, Callable[[], Layers]]:
        """The adapters that are scored beside base, seeds, soup and fused one, by label, made when they are called.

        Args:
            stacks: the seeds' adapters of every layer by path.
            seeds: their labels.
            fused: the fused adapter, if there is one.
            record: what :meth:`settle` found; empty without validation.
        """
        made: dict[str, Callable[[], Layers]] = {}
        tuned = record.get("controls", {})
        if self.has_controls and GAIN_SEED in tuned and fused is not None:
            factors = Stacks(
                {path: stack for path, stack in stacks.items() if isinstance(stack, LoRAFactors)}, full_weights(stacks)
            )
            best = list(seeds).index(tuned[GAIN_SEED]["seed"])
            made[GAIN_SEED] = partial(seed_times_gain, factors, fused, index=best)
        if self.has_controls and GAIN_SOUP in tuned:
            control = tuned[GAIN_SOUP]
            made[GAIN_SOUP] = partial(fuse, stacks, make_rule(control["method"], control["options"]))
        if GREEDY in tuned and (self.has_controls or GREEDY in self.compare):
            made[GREEDY] = partial(fuse, stacks, soup_of(tuned[GREEDY]["members"]))
        for name, rule in self.compare.items():
            if rule is not None:
                made[name] = partial(fuse, stacks, rule)
        return made if len(seeds) > 1 else {}


def rule_of_seeds(rule: BoundRule | None, kept: Sequence[int]) -> BoundRule | None:
    """A rule for some of the seeds, given by their places: the option ``weights`` is given for all."""
    if rule is None or (weights := rule.options.get("weights")) is None:
        return rule
    return replace(rule, options={**rule.options, "weights": [weights[place] for place in kept]})


def _several(n: int) -> list[tuple[int, ...]]:
    """Subsets of more than one seed and less than all."""
    return [chosen for chosen in subsets(n) if 1 < len(chosen) < n]


def _fused_members(stacks: Layers, chosen: Sequence[int], rule: BoundRule) -> Layers:
    return fuse(select_adapters(stacks, chosen), rule)


def _rows(rules: Mapping[str, BoundRule], scores: Mapping[str, RowScores]) -> list[dict[str, Any]]:
    return [
        {"name": name, **describe_rule(rule), "loss": scores[name].loss, "match": scores[name].match}
        for name, rule in rules.items()
        if is_finite(scores[name])
    ]
