"""Plan the replicas of a run: its seeds, each with the options that are swept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import TypeAlias

from seedlora.names import SCHEDULES, SWEPT, replica_name
from seedlora.training.replicas import Replica, ReplicaOptions
from seedlora.utils.options import name_option

#: How swept options go with the seeds: each value with each seed, or one value per seed.
SWEEP_MODES = ("cross", "zip")
#: Values to try by the name of a model option.
Sweep: TypeAlias = Mapping[str, Sequence[float | int | str]]


def planned_replicas(
    seeds: Sequence[int], *, vary: str = "both", sweep: Sweep | None = None, mode: str = "cross"
) -> tuple[Replica, ...]:
    """Return the replicas of a run, in their order: one per seed, or one per seed and set of swept options.

    Args:
        seeds: of the run.
        vary: what a seed decides: ``both``, ``init`` or ``order``.
        sweep: values by option. None sweeps nothing.
        mode: ``cross`` gives each seed all sets of values, the seeds of one set side by side; ``zip`` gives each seed
            one value of each option, in the order of both.

    Raises:
        ValueError: for an option that cannot be swept, values that are none of it or not distinct, or a number of
            values that the mode does not allow.
    """
    values = checked_sweep(sweep or {})
    if mode == "zip":
        for option, given in values.items():
            if len(given) != len(seeds):
                raise ValueError(
                    f"{name_option('ensemble.sweep_mode', 'zip')} gives each of the {len(seeds)} seeds its own value: "
                    f"{name_option('ensemble.sweep')} {option} must have {len(seeds)} values, got {len(given)}"
                )
        rows = zip(*values.values(), strict=True) if values else [()] * len(seeds)
        chosen = [(seed, dict(zip(values, row, strict=True))) for seed, row in zip(seeds, rows, strict=True)]
    else:
        for option, given in values.items():
            if repeated := sorted({value for value in given if given.count(value) > 1}, key=str):
                raise ValueError(f"{name_option('ensemble.sweep')} {option} has {repeated[0]} more than once")
        sets = [dict(zip(values, row, strict=True)) for row in product(*values.values())]
        chosen = [(seed, options) for options in sets for seed in seeds]
    first = seeds[0] if seeds else 0
    return tuple(
        Replica(
            replica_name(seed, {option: options[option] for option in SWEPT if option in options}),
            init_seed=first if vary == "order" else seed,
            order_seed=first if vary == "init" else seed,
            options=ReplicaOptions(**options),
        )
        for seed, options in chosen
    )


def checked_sweep(sweep: Sweep) -> dict[str, list[float | int | str]]:
    """Return the values of each swept option in the option's own type.

    Raises:
        ValueError: naming the option and what may be swept.
    """
    found: dict[str, list[float | int | str]] = {}
    for option, given in sweep.items():
        if option not in SWEPT:
            raise ValueError(
                f"{name_option('ensemble.sweep')} {option} cannot be swept; choose from {', '.join(SWEPT)}"
            )
        if isinstance(given, str) or not isinstance(given, Sequence) or not given:
            raise ValueError(f"{name_option('ensemble.sweep')} {option} must be a list of values, got {given!r}")
        found[option] = [_checked_value(option, value) for value in given]
    return found


def _checked_value(option: str, value: object) -> float | int | str:
    """Return a value in the type of its option: YAML reads 1e-3 as text."""
    if option == "lr_scheduler":
        if value not in SCHEDULES:
            known = ", ".join(SCHEDULES)
            raise ValueError(f"{name_option('ensemble.sweep')} {option} must be of {known}, got {value!r}")
        return str(value)
    try:
        number = float(str(value)) if not isinstance(value, bool) else None
    except ValueError:
        number = None
    if number is None or (option == "r" and number != int(number)):
        kind = "whole numbers" if option == "r" else "numbers"
        raise ValueError(f"{name_option('ensemble.sweep')} {option} must be {kind}, got {value!r}")
    return int(number) if option == "r" else number
