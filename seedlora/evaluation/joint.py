"""Score one adapter for several tasks: over the union of their items, and relative to each task's own adapter.

The two views of Stoica et al., "Model merging with SVD to tie the KnOTS", arXiv 2410.19735. Their joint view classifies
over the union of all label sets, with no hint which task an item is from. Reading taken for answers that are generated:
every item is asked in the same words around it, with the same ends and the same limit, and the answer is judged by the
item's own task; an answer that would be right for another task is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from seedlora.records.evaluation import JointRecord, RatioRecord
from seedlora.scores.intervals import CONFIDENCE_PERCENT, Score, percentiles, wilson
from seedlora.scores.tables import titled_table
from seedlora.scores.wording import PERCENT


@dataclass(frozen=True)
class Ratio:
    """A score relative to another on the same items, with its 95 % bootstrap interval.

    Args:
        value: the ratio.
        low: end of the interval.
        high: end of the interval.
        undefined: resamples, of :attr:`resamples`, in which some own adapter has nothing right, so that there is no
            ratio; the interval is of the others.
        resamples: all that were drawn.
    """

    value: float
    low: float
    high: float
    undefined: int
    resamples: int

    def to_record(self) -> RatioRecord:
        """Return plain data, for JSON."""
        return {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "undefined": self.undefined,
            "resamples": self.resamples,
        }


@dataclass(frozen=True)
class Joint:
    """Both views of several adapters: over the union of items, and relative to the tasks' own adapters.

    Args:
        tasks: number of items of each.
        own: task to the adapter that was trained on it alone.
        union: by adapter the share of right items over all tasks, each item counted once.
        scores: by adapter and task the share of right items.
        normalised: by adapter and task that share over the own adapter's; ``None`` where that is 0 or there is none.
        mean: by adapter the mean over the tasks that have one.
    """

    tasks: dict[str, int]
    own: dict[str, str]
    union: dict[str, Score]
    scores: dict[str, dict[str, float]]
    normalised: dict[str, dict[str, float | None]]
    mean: dict[str, Ratio | None]

    def to_record(self) -> JointRecord:
        """Return plain data, for JSON."""
        return {
            "tasks": self.tasks,
            "own": self.own,
            "union": {name: score.to_record() for name, score in self.union.items()},
            "scores": self.scores,
            "normalised": self.normalised,
            "mean": {name: None if mean is None else mean.to_record() for name, mean in self.mean.items()},
        }


def joint(correct: Mapping[str, np.ndarray], names: Sequence[str], *, resamples: int = 10_000, seed: int = 0) -> Joint:
    r"""Score adapters on the union of tasks.

    .. math:: \text{union} = \frac{\sum_t k_t}{\sum_t n_t}, \qquad
        \text{mean} = \frac1T \sum_t \frac{k_t / n_t}{k^\text{own}_t / n_t}

    The interval of the mean resamples the items of each task, the adapter's and the own adapter's verdicts together.

    Args:
        correct: by task bool, shape (items, adapters).
        names: of the columns. An adapter with the name of a task is that task's own.
        resamples: bootstrap samples.
        seed: of the resampling.
    """
    own = {task: task for task in correct if task in names}
    columns = {task: dict(zip(names, matrix.T, strict=True)) for task, matrix in correct.items()}
    measured = [task for task in own if columns[task][task].any()]
    scores = {name: {task: float(columns[task][name].mean()) for task in correct} for name in names}
    normalised: dict[str, dict[str, float | None]] = {
        name: {task: scores[name][task] / scores[task][task] if task in measured else None for task in correct}
        for name in names
    }
    return Joint(
        tasks={task: len(matrix) for task, matrix in correct.items()},
        own=own,
        union={name: wilson(np.concatenate([columns[task][name] for task in correct])) for name in names},
        scores=scores,
        normalised=normalised,
        mean={
            name: _mean_ratio([(columns[task][name], columns[task][task]) for task in measured], resamples, seed)
            for name in names
        },
    )


def _mean_ratio(pairs: Sequence[tuple[np.ndarray, np.ndarray]], resamples: int, seed: int) -> Ratio | None:
    if not pairs:
        return None
    generator, draws = np.random.default_rng(seed), np.zeros(resamples)
    for a, own in pairs:
        # An item is one of four: which of the two is right.
        counts = np.bincount(2 * a.astype(int) + own.astype(int), minlength=4)
        drawn = generator.multinomial(len(a), counts / len(a), size=resamples)
        with np.errstate(divide="ignore", invalid="ignore"):
            draws += (drawn[:, 2] + drawn[:, 3]) / (drawn[:, 1] + drawn[:, 3]) / len(pairs)
    defined = draws[np.isfinite(draws)]
    value = float(np.mean([a.mean() / own.mean() for a, own in pairs]))
    return Ratio(value, *percentiles(defined), resamples - len(defined), resamples)


def joint_table(found: Joint) -> Table:
    """Lay out both views for people, in percent."""
    n = sum(found.tasks.values())
    table = titled_table(f"joint: {len(found.tasks)} tasks, n = {n}, {CONFIDENCE_PERCENT} % intervals")
    table.add_column("adapter", overflow="fold")
    for header in ("all items", "interval", *found.tasks, "mean of own", "interval"):
        table.add_column(header, justify="right", overflow="fold")
    for name, score in found.union.items():
        cells = [PERCENT(score.value), PERCENT.between(score.low, score.high)]
        for task in found.tasks:
            part = found.normalised[name][task]
            cells.append(PERCENT(found.scores[name][task]) + ("" if part is None else f" ({100 * part:.0f})"))
        mean = found.mean[name]
        cells += (
            ["", ""] if mean is None else [f"{100 * mean.value:.0f}", f"{100 * mean.low:.0f} to {100 * mean.high:.0f}"]
        )
        table.add_row(name, *cells)
    captions = ["in brackets, and their mean: % of the score of the task's own adapter"] if found.own else []
    if alone := [task for task in found.tasks if task not in found.own]:
        captions.append(f"no adapter is named {', '.join(alone)}, so these are not relative to their own")
    if silent := [task for task in found.own if not found.scores[task][task]]:
        captions.append(f"the own adapter of {', '.join(silent)} has nothing right, so nothing is relative to it")
    dropped = max((mean.undefined / mean.resamples for mean in found.mean.values() if mean is not None), default=0)
    if dropped:
        captions.append(
            f"{100 * dropped:.2g} % of the resamples have an own adapter with nothing right and are in no interval"
        )
    table.caption = "; ".join(captions)
    return table
