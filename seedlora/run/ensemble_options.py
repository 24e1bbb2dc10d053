"""The options of an ensemble, checked before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seedlora.merge.bound_rule import MergeRule
from seedlora.names import ALL_CONTROLS, EQUAL_TOKENS, NO_CONTROLS, NO_MERGE, WIDE_BATCHES
from seedlora.run.halving import HALVED_ROWS, HalvingRound, check_parts, halving_rounds, survivors
from seedlora.run.sweep import SWEEP_MODES, Sweep, planned_replicas
from seedlora.selection.comparison import Comparison
from seedlora.training.averaging import averaging_steps
from seedlora.training.replicas import Replica
from seedlora.training.schedule import rate_schedule
from seedlora.utils.options import name_option

if TYPE_CHECKING:
    from seedlora.training.model_options import ModelOptions

BUDGETS = ("equal", "full")
VARY = ("both", "init", "order")
BEST_FUSED = "best_fused"
KEEP = ("last", "best", BEST_FUSED)
INDEPENDENT, BRANCH, LOCAL = "independent", "branch", "local"
SCHEMES = (INDEPENDENT, BRANCH, LOCAL)
#: The trunk's part of the steps, and the steps between two averages, where none is named.
TRUNK, AVERAGE_EVERY = 0.5, 20
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
    sweep: Sweep | None = None
    sweep_mode: str = "cross"
    scheme: str = INDEPENDENT
    trunk: float | None = None
    ema: float | None = None
    average_every: int | None = None
    average_growth: float | None = None
    outer_learning_rate: float | None = None
    halving: Sequence[float] | None = None
    ema_part: float | None = None
    halved_rows: str = "saved"

    def __post_init__(self) -> None:
        self._check_seeds()
        check_choice("vary", self.vary, VARY)
        check_choice("sweep_mode", self.sweep_mode, SWEEP_MODES)
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
        check_choice("scheme", self.scheme, SCHEMES)
        self._check_scheme()
        self._check_means()
        self._check_halving()
        # Rules and replicas are made here, so that a wrong name or option is known before training and not after it.
        self._check_weights(len(self.replicas))

    @cached_property
    def replicas(self) -> tuple[Replica, ...]:
        """Return what is trained: one replica per seed, or several where options are swept."""
        vary = self.vary if self.scheme == INDEPENDENT else "order"
        return planned_replicas(self.seeds, vary=vary, sweep=self.sweep, mode=self.sweep_mode)

    def shared_steps(self, steps: int, control: str | None = None) -> int:
        """Return in how many of so many optimizer steps, the first ones, all replicas of a fit are one.

        Args:
            steps: of the fit.
            control: the control that it trains; default: replicas.
        """
        if control is not None:
            return steps if control in WIDE_BATCHES else 0
        return 0 if self.scheme != BRANCH else round((TRUNK if self.trunk is None else self.trunk) * steps)

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
            finds_greedy=bool(self.sweep),
        )

    @property
    def keeps_best(self) -> bool:
        """Return whether the weights of a validation are kept, of each seed's own or of the fused adapter's best."""
        return self.keep in ("best", BEST_FUSED)

    @property
    def watches_validation(self) -> bool:
        """Return whether validation losses decide what is kept of the seeds, or when one is stopped."""
        return self.keeps_best or self.patience is not None

    def averaging_steps(self, total: int, options: ModelOptions) -> tuple[int, ...]:
        """Return the optimizer steps after which replicas are averaged, with scheme ``local`` or an outer step.

        Args:
            total: steps of the fit.
            options: of the model, which say the learning rate.
        """
        factor, every = rate_schedule(options, total=total), self.average_every or AVERAGE_EVERY
        return averaging_steps(
            total, every, growth=self.average_growth, rate=lambda step: options.learning_rate * factor(step)
        )

    def halving_rounds(self, steps: int) -> tuple[HalvingRound, ...]:
        """Return when replicas that train for so many steps are halved; raises as :func:`halving_rounds`."""
        shares_rows = self.halved_rows == "shared"
        return halving_rounds(self.halving or (), steps=steps, n=len(self.replicas), shares_rows=shares_rows)

    def ema_decay(self, steps: int) -> float | None:
        """Return the decay of the exponential means in a fit of so many steps; None where there are none.

        Raises:
            ValueError: if the part of the run that a mean is to reach back is less than two steps.
        """
        if self.ema_part is None:
            return self.ema
        back = self.ema_part * steps
        if back < 2:
            raise ValueError(
                f"{name_option('ensemble.ema_part', self.ema_part)} of {steps} steps is {back:g}; a mean must reach "
                "back at least 2 steps: train for more, or choose a larger part"
            )
        return 1 - 1 / back

    @property
    def takes_means(self) -> bool:
        """Return whether exponential means of the weights are taken."""
        return self.ema is not None or self.ema_part is not None

    @property
    def one_stack(self) -> str | None:
        """Return the option for which all replicas must be trained at once, for messages, if there is one."""
        if self.scheme != INDEPENDENT:
            return name_option("ensemble.scheme", self.scheme)
        if self.controls == EQUAL_TOKENS:
            return name_option("ensemble.controls", EQUAL_TOKENS)
        if self.halving is not None:
            return name_option("ensemble.halving")
        return name_option("ensemble.keep", BEST_FUSED) if self.keep == BEST_FUSED else None

    @property
    def whole_adapters(self) -> str | None:
        """Return the options that read or write the adapters in training, for messages, if there are some."""
        asked = {
            "keep": self.keeps_best,
            "patience": self.patience is not None,
            "scheme": self.scheme != INDEPENDENT,
            "halving": self.halving is not None,
            "ema": self.ema is not None,
            "ema_part": self.ema_part is not None,
            "controls": self.controls == EQUAL_TOKENS,
        }
        given = [
            name_option(f"ensemble.{option}", getattr(self, option)) for option, is_given in asked.items() if is_given
        ]
        return " and ".join(given) or None

    def _check_scheme(self) -> None:
        """Raise ValueError for what does not go with the scheme, and for numbers out of range."""
        if self.trunk is not None and self.scheme != BRANCH:
            given = f"{name_option('ensemble.scheme')} is {self.scheme}"
            raise ValueError(f"{name_option('ensemble.trunk')} is of scheme {BRANCH}, and {given}")
        own = {name: getattr(self, name) for name in ("average_every", "average_growth", "outer_learning_rate")}
        for name, value in own.items():
            if value is not None and self.scheme != LOCAL:
                given = f"{name_option('ensemble.scheme')} is {self.scheme}"
                raise ValueError(f"{name_option(f'ensemble.{name}')} is of scheme {LOCAL}, and {given}")
            if value is not None and value <= 0:
                raise ValueError(f"{name_option(f'ensemble.{name}')} must be positive, got {value}")
        if self.trunk is not None and not 0 <= self.trunk <= 1:
            raise ValueError(f"{name_option('ensemble.trunk')} is a part of the steps, from 0 to 1, got {self.trunk}")
        if self.keep == BEST_FUSED and self.merge == NO_MERGE:
            raise ValueError(
                f"{name_option('ensemble.keep', BEST_FUSED)} watches the fused adapter, and with "
                f"{name_option('ensemble.merge', NO_MERGE)} there is none"
            )
        if self.controls == EQUAL_TOKENS and self.sweep:
            raise ValueError(
                f"{name_option('ensemble.controls', EQUAL_TOKENS)} has the rows of all seeds, and with "
                f"{name_option('ensemble.sweep')} several replicas have the same ones; leave out one of them"
            )
        if self.scheme == INDEPENDENT:
            return
        if self.vary == "init":
            raise ValueError(
                f"{name_option('ensemble.scheme', self.scheme)} starts all replicas at the same weights, so their "
                f"orders must differ: {name_option('ensemble.vary', 'init')} does not go with it; take order, or both"
            )
        if self.sweep:
            raise ValueError(
                f"{name_option('ensemble.scheme', self.scheme)} is of replicas that differ in their seeds alone; leave "
                f"out {name_option('ensemble.sweep')}"
            )

    def _check_means(self) -> None:
        """Raise ValueError for a decay, or a part of the run, that cannot be, and for both."""
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"{name_option('ensemble.ema')} must be between 0 and 1, 0.99 for example, got {self.ema}")
        if self.ema_part is not None and not 0 < self.ema_part <= 1:
            raise ValueError(
                f"{name_option('ensemble.ema_part')} is a part of the steps, 0.1 for example, got {self.ema_part}"
            )
        if self.ema is not None and self.ema_part is not None:
            raise ValueError(
                f"{name_option('ensemble.ema')} is a decay per step, and {name_option('ensemble.ema_part')} sets it; "
                "leave out one of them"
            )

    def _check_halving(self) -> None:
        """Raise ValueError for parts that cannot be, and for what does not go with halving."""
        check_choice("halved_rows", self.halved_rows, HALVED_ROWS)
        if self.halving is None:
            if self.halved_rows == "shared":
                raise ValueError(
                    f"{name_option('ensemble.halved_rows', 'shared')} is of {name_option('ensemble.halving')}, which "
                    "is not given"
                )
            return
        n = len(self.replicas)
        check_parts(self.halving, n)
        if self.halved_rows == "shared" and n % 2 and len(self.halving) == 1:
            left = survivors(n)
            raise ValueError(
                f"{name_option('ensemble.halved_rows', 'shared')}: the rows of the {n - left} dropped of {n} replicas "
                f"cannot be dealt to {left} in equal parts; train {n + 1}, or halve twice"
            )
        if self.scheme != INDEPENDENT:
            raise ValueError(
                f"{name_option('ensemble.halving')} drops replicas, from which the others learn by "
                f"{name_option('ensemble.scheme', self.scheme)}; leave out one of them"
            )
        if self.keep == BEST_FUSED:
            raise ValueError(
                f"{name_option('ensemble.keep', BEST_FUSED)} compares validations of one fused adapter, and "
                f"{name_option('ensemble.halving')} changes what is fused; take "
                f"{name_option('ensemble.keep', 'best')}, or last"
            )
        if self.controls in (ALL_CONTROLS, EQUAL_TOKENS):
            raise ValueError(
                f"{name_option('ensemble.controls', self.controls)} trains one seed for the tokens of all, and with "
                f"{name_option('ensemble.halving')} the replicas have different ones; take untrained"
            )

    def _check_seeds(self) -> None:
        if not self.seeds:
            raise ValueError(
                f"{name_option('ensemble.seeds')} is empty; give at least one seed, for example [11, 42, 202]"
            )
        if wrong := [seed for seed in self.seeds if not 0 <= seed < 2**63]:
            raise ValueError(f"{name_option('ensemble.seeds')} must be from 0 to 2**63 - 1, got {wrong[0]}")
        if repeated := sorted({seed for seed in self.seeds if self.seeds.count(seed) > 1}):
            raise ValueError(f"{name_option('ensemble.seeds')} must differ, but {repeated[0]} is given more than once")

    def _check_weights(self, n: int) -> None:
        """Raise ValueError unless a rule's option ``weights`` has one number per replica."""
        compared = [("compare_options", rule) for rule in self.comparison.compare.values()]
        for option, rule in [("merge_options", self.comparison.rule), *compared]:
            weights = None if rule is None else rule.options.get("weights")
            if weights is not None and len(weights) != n:
                one = "replica" if self.sweep else "seed"
                raise ValueError(
                    f"{name_option(f'ensemble.{option}')} weights must be {n} numbers, one per {one}, got {weights}"
                )
