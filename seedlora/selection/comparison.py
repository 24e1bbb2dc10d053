"""Bind what a run is asked to compare, before training: the merge rule, other methods, controls.

:mod:`seedlora.selection.settling` chooses and scores what is asked for here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

from seedlora.merge.bound_rule import BoundRule, MergeRule
from seedlora.merge.method_table import check_ensemble_merge
from seedlora.merge.registry import make_rule
from seedlora.names import (
    ALL_CONTROLS,
    AUTO,
    AUTO_GAIN,
    EQUAL_TOKENS,
    GREEDY,
    NO_CONTROLS,
    NO_MERGE,
    SOUP,
    UNTRAINED,
    nothing_for_one_seed,
)
from seedlora.records.selection import Selection
from seedlora.selection.candidates import gain_family
from seedlora.selection.choice import check_select_by
from seedlora.utils.options import name_option

#: Training rows at most on which all that was tested is scored.
TRAIN_ROWS = 128
CONTROLS = (NO_CONTROLS, UNTRAINED, ALL_CONTROLS, EQUAL_TOKENS)


class Comparison:
    """Bind the merge rule of a run and what it is measured against, and check both before anything is trained.

    Args:
        merge: a method of :data:`seedlora.merge.registry.METHODS` or any rule; ``none`` merges nothing. ``auto``
            chooses among :func:`seedlora.selection.candidates.any_method`, ``auto_gain`` among
            :func:`seedlora.selection.candidates.gain_family`, and ``greedy_soup`` its members, all on validation rows.
        options: keyword options of the method.
        compare: further methods, scored on the same test items.
        compare_options: keyword options of these, by method.
        controls: ``untrained`` adds one seed times the gain of the fused adapter, the soup times the factor that is
            best on validation rows, the greedy soup, and the mean of the seeds' probabilities; ``all`` and
            ``equal_tokens`` train more adapters, see :class:`seedlora.callbacks.seed_ensemble.SeedEnsembleCallback`.
        select_by: what is best on validation rows: the lowest ``loss``, or most exact matches (``match``).
        finds_greedy: find the greedy soup and compare it, where there are validation rows and something is merged.

    Raises:
        ValueError: for an unknown method, option or control.
    """

    def __init__(
        self,
        merge: str | MergeRule = "seedlora",
        options: Mapping[str, object] | None = None,
        *,
        compare: Sequence[str] = (),
        compare_options: Mapping[str, Mapping[str, object]] | None = None,
        controls: str = NO_CONTROLS,
        select_by: str = "loss",
        finds_greedy: bool = False,
    ) -> None:
        self.merge, self.options, self.select_by = merge, dict(options or {}), select_by
        self.controls, self._finds_greedy = controls, finds_greedy
        check_select_by(select_by)
        if controls not in CONTROLS:
            raise ValueError(
                f"Unknown {name_option('ensemble.controls')} '{controls}'; choose one of {', '.join(CONTROLS)}"
            )
        if merge == AUTO and self.options:
            raise ValueError(f"Merge method '{AUTO}' chooses the options too; it takes none, got {self.options}")
        if merge == "seedlora_gain" and "p" not in self.options:
            raise ValueError(
                f"{name_option('ensemble.merge', merge)} needs its p, for example "
                f"{name_option('ensemble.merge_options', {'p': 0.5})}; "
                "to choose "
                f"it on validation rows, take {AUTO_GAIN}"
            )
        self.chooses = merge in (AUTO, AUTO_GAIN) or (merge == GREEDY and "score" not in self.options)
        #: The rule; where it is to be chosen, what stands for it until then.
        self.rule: BoundRule | None = None
        if isinstance(merge, str):
            check_ensemble_merge(merge)
        if self.chooses:
            gain_family((), options=self.options) if merge == AUTO_GAIN else make_rule("soup", self.options)
            self.rule = make_rule("soup")
        elif merge != NO_MERGE:
            self.rule = make_rule(merge, self.options)
        #: The methods to compare by name; ``None`` is the greedy soup, whose members the validation rows say.
        self.compare = self._bind(compare, compare_options or {})
        if self.rule is None and (self.has_controls or GREEDY in self.compare):
            asked, nothing = self.validated_for, name_option("ensemble.merge", NO_MERGE)
            raise ValueError(f"{asked} is tuned where seeds are merged, and {nothing} merges nothing")

    def _bind(self, names: Sequence[str], options: Mapping[str, Mapping[str, object]]) -> dict[str, BoundRule | None]:
        """Make rules of the methods to compare, but not of soup, which is compared anyway."""
        if unknown := sorted(set(options) - set(names)):
            raise ValueError(
                f"{name_option('ensemble.compare_options')} names {unknown[0]}, which "
                f"{name_option('ensemble.compare')} does not"
            )
        if repeated := sorted({name for name in names if list(names).count(name) > 1}):
            raise ValueError(f"{name_option('ensemble.compare')} names {repeated[0]} more than once")
        bound: dict[str, BoundRule | None] = {}
        for name in names:
            given = dict(options.get(name, {}))
            same = name == self.merge and given == self.options and not self.chooses
            if same or (name == SOUP and not given):
                continue
            bound[name] = None if name == GREEDY else make_rule(name, given)
        return bound

    def of_seeds(self, kept: Sequence[int]) -> Comparison:
        """Return the same among some of the seeds, given by their places: see :func:`rule_of_seeds`."""
        found = copy.copy(self)
        found.rule = rule_of_seeds(self.rule, kept)
        found.compare = {name: rule_of_seeds(rule, kept) for name, rule in self.compare.items()}
        return found

    @property
    def method_name(self) -> str:
        """Return the merge method, for people."""
        return self.merge if isinstance(self.merge, str) else getattr(self.merge, "__name__", repr(self.merge))

    @property
    def has_controls(self) -> bool:
        """Return whether any control was asked for."""
        return self.controls != NO_CONTROLS

    @property
    def validated_for(self) -> str | None:
        """Return the option that needs validation rows, if one does."""
        if self.chooses:
            return name_option("ensemble.merge", self.merge)
        if self.has_controls:
            return name_option("ensemble.controls", self.controls)
        return name_option("ensemble.compare", GREEDY) if GREEDY in self.compare else None

    def nothing_for(self, n: int) -> str | None:
        """Say in a sentence what was asked for and does nothing with so many seeds."""
        options = {
            name_option("ensemble.merge", self.merge): self.chooses,
            name_option("ensemble.compare"): self.compare,
            name_option("ensemble.controls"): self.has_controls,
        }
        return nothing_for_one_seed(options) if n == 1 else None

    def lacks(self, selection: Selection | None) -> str | None:
        """Return what is to be compared and was not settled on validation rows when the seeds were merged."""
        settled = {} if selection is None else selection["controls"]
        if self.has_controls and not settled:
            return "controls"
        return GREEDY if GREEDY in self.compare and GREEDY not in settled else None

    @property
    def is_soup(self) -> bool:
        """Return whether the fused adapter is the plain soup, which then has no second name."""
        return self.merge == SOUP and not self.options

    @property
    def wants_greedy(self) -> bool:
        """Return whether the members of the greedy soup have to be found."""
        return self.merge in (AUTO, GREEDY) or self.compares_greedy

    @property
    def compares_greedy(self) -> bool:
        """Return whether the greedy soup is scored beside the others, once its members are known."""
        return self.has_controls or GREEDY in self.compare or self._finds_greedy


def rule_of_seeds(rule: BoundRule | None, kept: Sequence[int]) -> BoundRule | None:
    """Return a rule for some of the seeds, given by their places: the option ``weights`` is given for all."""
    if rule is None or (weights := rule.options.get("weights")) is None:
        return rule
    return replace(rule, options={**rule.options, "weights": [weights[place] for place in kept]})
