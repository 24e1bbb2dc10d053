"""Say whether a run's budget was better spent on training one seed longer, or on more seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import cast

from seedlora.names import LONG_SEED, SOUP
from seedlora.records.cost import PlanRecord
from seedlora.records.report import TrainingCurves
from seedlora.records.results import LossRecord
from seedlora.records.train_or_fuse import TrainOrFuseRecord
from seedlora.report.stored import StoredRun
from seedlora.report.training_curves import end_of
from seedlora.run.ensemble_options import INDEPENDENT
from seedlora.scores.train_or_fuse import (
    FUSE,
    TRAIN_LONGER,
    Estimate,
    TrainOrFuse,
    fall_per_efold,
    next_step,
    train_or_fuse,
)
from seedlora.scores.wording import LOSS
from seedlora.training.schedule import learning_rate_factor, warmup_of


def train_or_fuse_record(run: StoredRun, curves: TrainingCurves) -> TrainOrFuseRecord | None:
    """Compare soup with a seed that is trained longer; None before the end, and where replicas are no single seeds.

    Those of a sweep differ in more, and those of a scheme learn from each other.

    Args:
        run: what is stored.
        curves: of the run.
    """
    plan = None if run.cost is None else run.cost["plan"]
    if plan is None or not run.trained or run.pending:
        return None
    settings = cast("Mapping[str, object]", run.settings)
    if any(plan.get("replicas", {}).values()) or settings.get("ensemble.scheme", INDEPENDENT) != INDEPENDENT:
        return None
    ratio = _loss_ratio(run.trained, curves)
    found = train_or_fuse(_slope(run, curves, plan), _gain(run), len(run.trained), loss_ratio=ratio)
    long, selection = curves["ends"].get(LONG_SEED), run.selection
    loss = None
    if long is not None and selection is not None and SOUP in selection["scores"]:
        loss = long["last"] - selection["scores"][SOUP]["loss"]
    return {
        "verdict": found.verdict,
        "seeds": len(run.trained),
        "slope": _record(found.slope),
        "gain": _record(found.gain),
        "margin": _record(found.margin),
        "loss_ratio": ratio,
        "long_seed": loss,
        "sentences": _sentences(found, len(run.trained), plan["steps"], loss),
    }


def _slope(run: StoredRun, curves: TrainingCurves, plan: PlanRecord) -> Estimate | None:
    """Estimate s from the seeds that were trained to the end."""
    rate = _rate(run, plan["steps"])
    by_step = [_validated(run, curves, seed, plan["steps"]) for seed in run.trained]
    ended = [curve for curve in by_step if plan["steps"] in curve]
    if rate is None or not ended:
        return None
    steps = sorted(set.intersection(*map(set, ended)))
    return fall_per_efold(steps, [[curve[step] for step in steps] for curve in ended], rate)


def _validated(run: StoredRun, curves: TrainingCurves, seed: str, end: int) -> dict[int, float]:
    """Return the validation losses of a seed by step; that of its last weights is the selection's, if none is later.

    The selection reads the same rows, after the last step, which the validations in training need not meet.
    """
    found = {int(step): loss for step, loss in curves["validation"].get(seed, [])}
    trained = run.trained_on.get(seed)
    if run.selection is None or trained is None or trained["steps"] != end or trained["kept_step"] not in (None, end):
        return found
    scored = run.selection["scores"].get(seed)
    return found if scored is None or not found else {end: scored["loss"], **found}


def _loss_ratio(seeds: Sequence[str], curves: TrainingCurves) -> float | None:
    """Return the training loss of the seeds over their validation loss, at the end; None where one is not known."""
    if not all(curves["train"].get(seed) and seed in curves["ends"] for seed in seeds):
        return None
    trained = sum(end_of(curves["train"][seed]) for seed in seeds)
    return trained / sum(curves["ends"][seed]["last"] for seed in seeds)


def _rate(run: StoredRun, total: int) -> Callable[[int], float] | None:
    """Return the learning rate of an optimizer step over its largest value; None where the schedule is not stored."""
    settings = cast("Mapping[str, object]", run.settings)
    schedule, ratio = settings.get("model.lr_scheduler"), settings.get("model.warmup_ratio")
    steps = settings.get("model.warmup_steps")
    if not isinstance(schedule, str) or not isinstance(ratio, int | float):
        return None
    warmup = warmup_of(total, ratio=ratio, steps=steps if isinstance(steps, int) else None)
    return partial(learning_rate_factor, schedule=schedule, warmup=warmup, total=total)


def _gain(run: StoredRun) -> Estimate | None:
    """Return what soup gains over the mean seed on the validation rows."""
    row = None if run.selection is None else run.selection.get("soup_gain")
    return None if row is None else Estimate(row["value"], row["low"], row["high"])


def _record(estimate: Estimate | None) -> LossRecord | None:
    return None if estimate is None else {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def _sentences(found: TrainOrFuse, n: int, steps: int, long: float | None) -> list[str]:
    """Say the verdict with its uncertainty, what to do next, and what the long seed showed, if there is one."""
    sentences = [f"Train longer, or fuse? {_verdict(found, n, n * steps)}"]
    if n > 1:
        sentences.append(next_step(found))
    if long is not None:
        against = f"{LOSS(abs(long))} {'below' if long > 0 else 'above'} that of {LONG_SEED}"
        sentences.append(f"It was tried: the validation loss of soup is {against}.")
    return sentences


def _verdict(found: TrainOrFuse, n: int, steps: int) -> str:
    """Say which of the two is expected to be better, and by which numbers."""
    if found.margin is None or found.slope is None or found.gain is None:
        return f"That cannot be said: {found.reason}."
    longer, efolds = f"one seed trained for {steps:,} steps", math.log(n)
    slope = Estimate(*(efolds * end for end in found.slope))
    numbers = (
        f"In validation loss soup gains {_written(found.gain)} over the mean seed, and {n} times the steps are worth "
        f"{_written(slope)} to a seed"
    )
    if found.verdict == FUSE:
        return f"Fuse: soup of the {n} seeds is expected to beat {longer}. {numbers}."
    if found.verdict == TRAIN_LONGER:
        return f"Train longer: {longer} is expected to beat soup of the {n}. {numbers}."
    if found.reason:
        return f"That cannot be said. {numbers}; but {found.reason}."
    return f"That cannot be said. {numbers}: the difference may have either sign."


def _written(estimate: Estimate) -> str:
    return LOSS.with_interval(estimate.value, estimate.low, estimate.high)
