"""The options of an ensemble, checked before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from seedlora.merge.bound_rule import MergeRule
from seedlora.names import NO_CONTROLS
from seedlora.selection.comparison import Comparison
from seedlora.utils.options import name_option

BUDGETS = ("equal", "full")
VARY = ("both", "init", "order")
KEEP = ("last", "best")
ON_DIVERGENCE = ("stop", "exclude")
#: The stack size that the memory estimate decides.
AUTO = "auto"


def check_choice(option: str, value: str, allowed: Sequence[str]) -> None:
    """Raise ValueError unless the value of an option is an allowed one."""
    if value not in allowed:
        raise ValueError(f"Unknown {name_option(f'ensemble.{option}')} '{value}'; choose one of {', '.join(allowed)}")


@dataclass(frozen=True)
class EnsembleOptions:
    """Hold what was asked of an ensemble.

    The fields are the arguments of :class:`seedlora.callbacks.seed_ensemble.SeedEnsembleCallback`, which says what each
    of them does.

    Raises:
        ValueError: for seeds that are not distinct and non-negative, and for an unknown method, option or choice.
    """

    seeds: tuple[int, ...] = (11, 42, 202)
    merge: str | MergeRule = "seedlora"
    merge_options: Mapping[str, Any] | None = None
    compare: Sequence[str] | str | None = None
    compare_options: Mapping[str, Mapping[str, Any]] | None = None
    controls: str = NO_CONTROLS
    select_by: str = "loss"
    dirpath: str | Path | None = None
    budget: str = "equal"
    vary: str = "both"
    stack_size: int | str | None = None
    keep: str = "last"
    patience: int | None = None
    on_divergence: str = "stop"
    checkpoint_every_n_steps: int = 25
    resume: bool = False

    def __post_init__(self) -> None:
        self._check_seeds()
        check_choice("vary", self.vary, VARY)
        size = self.stack_size
        if not (size in (None, AUTO) or (isinstance(size, int) and size >= 1)):
            raise ValueError(f"{name_option('ensemble.stack_size')} must be at least 1, or '{AUTO}', got {size!r}")
        check_choice("keep", self.keep, KEEP)
        check_choice("on_divergence", self.on_divergence, ON_DIVERGENCE)
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"{name_option('ensemble.patience')} must be at least 1 validation, got {self.patience}")
        if self.checkpoint_every_n_steps < 1:
            raise ValueError(
                f"{name_option('ensemble.checkpoint_every_n_steps')} must be at least 1, got "
                f"{self.checkpoint_every_n_steps}"
            )
        check_choice("budget", self.budget, BUDGETS)
        # The rules are bound here, so that a wrong name or option is known before training and not after it.
        self._check_weights()

    @cached_property
    def comparison(self) -> Comparison:
        """Return the merge rule and what it is compared with."""
        names = self.compare.split(",") if isinstance(self.compare, str) else self.compare or ()
        return Comparison(
            self.merge,
            self.merge_options,
            compare=[name.strip() for name in names if name.strip()],
            compare_options=self.compare_options,
            controls=self.controls,
            select_by=self.select_by,
        )

    @property
    def watches_validation(self) -> bool:
        """Return whether each seed's own validation loss decides what is kept of it, or when it is stopped."""
        return self.keep == "best" or self.patience is not None

    def _check_seeds(self) -> None:
        if not self.seeds:
            raise ValueError(
                f"{name_option('ensemble.seeds')} is empty; give at least one seed, for example [11, 42, 202]"
            )
        if wrong := [seed for seed in self.seeds if not 0 <= seed < 2**63]:
            raise ValueError(f"{name_option('ensemble.seeds')} must be from 0 to 2**63 - 1, got {wrong[0]}")
        if repeated := sorted({seed for seed in self.seeds if self.seeds.count(seed) > 1}):
            raise ValueError(f"{name_option('ensemble.seeds')} must differ, but {repeated[0]} is given more than once")

    def _check_weights(self) -> None:
        """Raise ValueError unless a rule's option ``weights`` has one number per seed."""
        compared = [("compare_options", rule) for rule in self.comparison.compare.values()]
        for option, rule in [("merge_options", self.comparison.rule), *compared]:
            weights = None if rule is None else rule.options.get("weights")
            if weights is not None and len(weights) != len(self.seeds):
                raise ValueError(
                    f"{name_option(f'ensemble.{option}')} weights must be {len(self.seeds)} numbers, one per seed, "
                    f"got {weights}"
                )
