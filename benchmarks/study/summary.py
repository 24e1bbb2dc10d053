"""Print what the cells say: tables, one figure, and what became of each idea that was to be proved wrong."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from scipy.stats import t as student

from benchmarks.study.design import COUNTS, LENGTHS, TASKS

FIGURE = Path(__file__).parent / "lengths.svg"
SHOWN = (
    "mean seed",
    "seedlora",
    "gain p",
    "soup x scale",
    "knots_ties",
    "ties",
    "soup of means",
    "best fused",
    "best seeds",
)
WAYS = ("one start", "branch 0.5", "local", "outer", "outer, one seed", "rates", "best rate")
CONTROLS = ("long seed", "long seed, best", "long seed, mean", "wide batch")
LENGTH_NAMES = {1 / 3: "a third of the floor", 1.0: "at the floor", 3.0: "three floors"}
Line = dict[str, Any]


class Mean(NamedTuple):
    """A mean over cells with Student's 95 % interval, and in how many of them it was shown to be below or above 0."""

    value: float
    low: float
    high: float
    below: int
    above: int
    n: int

    def __str__(self) -> str:
        """Return the mean, its interval, and the cells in which it was shown."""
        if not self.n:
            return ""
        ends = "" if math.isnan(self.low) else f" ({self.low:+.3f} to {self.high:+.3f})"
        return f"{self.value:+.3f}{ends} {self.below}<{self.above}>{self.n}"


def mean_of(lines: Iterable[Line], label: str, reference: str = "soup", metric: str = "loss") -> Mean:
    """Return the mean difference of an adapter from a reference over cells."""
    found = [
        line["test"][label]["vs"][reference][metric]
        for line in lines
        if reference in line["test"].get(label, {"vs": {}})["vs"]
    ]
    values = [value for value, _, _ in found]
    if not values:
        return Mean(math.nan, math.nan, math.nan, 0, 0, 0)
    mean, n, half = statistics.mean(values), len(values), math.nan
    if n > 1:
        half = statistics.stdev(values) / math.sqrt(n) * float(student.ppf(0.975, n - 1))
    return Mean(
        mean, mean - half, mean + half, sum(high < 0 for _, _, high in found), sum(low > 0 for _, low, _ in found), n
    )


def show(lines: Sequence[Line], floors: dict[str, Any], console: Console) -> None:
    """Print all tables, and draw the figure."""
    ways = [line for line in lines if line["cell"]["kind"] == "ways"]
    for task, floor in floors.items():
        console.print(
            f"{task}: floor at {floor['epochs']} epochs, rate {floor['rate']:g}, validation loss {floor['loss']:.3f}"
        )
    for metric in ("loss", "match"):
        for length in LENGTHS:
            _show_length([line for line in ways if _is(line, length)], length, metric, console)
    _show_levels(ways, console)
    _show_counts([line for line in lines if line["cell"]["kind"] == "counts"], console)
    _show_sentence(ways, console)
    draw(ways, FIGURE)
    console.print(f"figure: {FIGURE}")


def _is(line: Line, length: float) -> bool:
    return math.isclose(line["cell"]["length"], length)


def _of_task(lines: Iterable[Line], task: str) -> list[Line]:
    return [line for line in lines if line["cell"]["task"] == task]


def _level(lines: Sequence[Line], label: str, metric: str) -> float:
    """Return the mean loss, or matches in %, of an adapter."""
    return statistics.mean(line["test"][label][metric] for line in lines) * (100 if metric == "match" else 1)


def _show_length(lines: Sequence[Line], length: float, metric: str, console: Console) -> None:
    """Print the differences from soup at one length: over all cells, and of each task."""
    table = Table(
        title=f"{metric} less that of soup, {LENGTH_NAMES[length]}: mean (95 %) cells shown below < above > all"
    )
    for title in ("adapter", "all", *TASKS):
        table.add_column(title)
    for label in (*SHOWN, *WAYS, *CONTROLS):
        by_task = [
            mean_of([line for line in lines if line["cell"]["task"] == task], label, metric=metric) for task in TASKS
        ]
        table.add_row(label, str(mean_of(lines, label, metric=metric)), *map(str, by_task))
    console.print(table)


def _show_levels(lines: Sequence[Line], console: Console) -> None:
    """Print mean losses and matches themselves."""
    table = Table(title="test loss and exact match in %, means over sets")
    labels = ("mean seed", "soup", "seedlora", "long seed, best", "wide batch")
    for title in ("task", "length", "cosine", *labels):
        table.add_column(title)
    for task in TASKS:
        for length in LENGTHS:
            own = [line for line in lines if line["cell"]["task"] == task and _is(line, length)]
            if own:
                levels = [f"{_level(own, label, 'loss'):.3f}; {_level(own, label, 'match'):.1f}" for label in labels]
                cosine = f"{statistics.mean(line['cosine'] for line in own):.2f}"
                table.add_row(task, LENGTH_NAMES[length], cosine, *levels)
    console.print(table)


def _show_counts(lines: Sequence[Line], console: Console) -> None:
    """Print losses and matches by the number of seeds, each trained to the floor, and of one seed for their tokens."""
    table = Table(title="at the floor, by number of seeds: loss; exact match in %")
    for title in ("task", "seeds", "mean seed", "soup", "seedlora", "long, best", "wide, rate x root n"):
        table.add_column(title)
    for line in lines:
        test = line["test"]
        for n in COUNTS:
            labels = ("mean seed", f"soup of {n}", f"seedlora of {n}", f"long {n}", f"wide {n}")
            found = [f"{test[label]['loss']:.3f}; {100 * test[label]['match']:.1f}" for label in labels]
            table.add_row(line["cell"]["task"], str(n), *found)
    console.print(table)


def sentence_counts(lines: Iterable[Line]) -> dict[str, int]:
    """Count how often the sentence "train longer, or fuse?" was right, of cells whose truth is shown by an interval.

    The truth is the difference of soup from the long seed's last step, in test loss.
    """
    counts = {"right": 0, "wrong": 0, "said nothing": 0, "truth not shown": 0}
    for line in lines:
        _, low, high = line["test"]["long seed"]["vs"]["soup"]["loss"]
        said = line["sentence"]["verdict"]
        if low <= 0 <= high:
            counts["truth not shown"] += 1
        elif said == "unknown":
            counts["said nothing"] += 1
        else:
            counts["right" if (said == "fuse") == (low > 0) else "wrong"] += 1
    return counts


def _show_sentence(lines: Sequence[Line], console: Console) -> None:
    """Print how often the sentence was right, by length."""
    for length in LENGTHS:
        counts = sentence_counts([line for line in lines if _is(line, length)])
        console.print(
            f"train longer, or fuse? {LENGTH_NAMES[length]}: {', '.join(f'{n} {k}' for k, n in counts.items())}"
        )


def draw(lines: Sequence[Line], path: Path) -> None:
    """Draw the losses of the ways over the length of training, a panel for each task."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from seedlora.report.drawing import COLOURS

    labels = ("soup", "mean seed", "seedlora", "long seed, best", "wide batch", "local")
    with rc_context({"svg.hashsalt": "study", "font.size": 9}):
        figure = Figure(figsize=(10, 3.2), layout="constrained")
        for i, task in enumerate(TASKS):
            panel = figure.add_subplot(1, len(TASKS), i + 1)
            for label, colour in zip(labels, COLOURS, strict=False):
                points = []
                for length in LENGTHS:
                    own = [line for line in lines if line["cell"]["task"] == task and _is(line, length)]
                    values = [line["test"][label]["loss"] for line in own if label in line["test"]]
                    if values:
                        points.append((length, statistics.mean(values)))
                if points:
                    panel.plot(*zip(*points, strict=True), marker="o", label=label, color=colour)
            panel.set(title=task.replace("_", " "), xscale="log", xlabel="epochs of a seed, in floors")
            panel.set_xticks(LENGTHS, ["1/3", "1", "3"])
            panel.minorticks_off()
        figure.axes[0].set_ylabel("test loss, nats per token")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(labels))
        figure.savefig(path, metadata={"Date": None})
