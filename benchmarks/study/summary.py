"""Make tables and the figure of the cells, in the terminal and as ``tables.md``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from scipy.stats import t as student

from benchmarks.study.design import COUNTS, LENGTHS, TASKS
from seedlora.utils.files import write_text

FUSED = ("mean seed", "seedlora", "gain p", "soup x scale", "knots_ties", "ties", "soup of means")
WAYS = (
    "best seeds",
    "best fused",
    "one start",
    "branch 0.5",
    "local",
    "outer",
    "outer, one seed",
    "rates",
    "best rate",
)
CONTROLS = ("long seed", "long seed, best", "long seed, mean", "wide batch")
DRAWN = {
    "soup": "soup",
    "mean seed": "mean seed",
    "seedlora": "the paper's rule",
    "long seed, best": "one seed for all tokens, its best",
    "wide batch": "one seed, all rows in each step",
    "best seeds": "soup of each seed's best",
}
LENGTH_NAMES = {1 / 3: "a third of the floor", 1.0: "the floor", 3.0: "three floors"}
Line = dict[str, Any]


class Mean(NamedTuple):
    """A mean over cells with Student's 95 % interval, and in how many of them it was shown to be below or above 0."""

    value: float
    low: float
    high: float
    below: int
    above: int
    n: int

    def text(self, metric: str) -> str:
        """Say the mean, its interval, and the cells in which the adapter was shown lower, higher, of all."""
        if not self.n:
            return ""
        scale, form = (100, "+.1f") if metric == "match" else (1, "+.3f")
        ends = "" if math.isnan(self.low) else f" ({scale * self.low:{form}} to {scale * self.high:{form}})"
        return f"{scale * self.value:{form}}{ends}; {self.below}, {self.above} of {self.n}"


class Grid(NamedTuple):
    """A table that is still to be printed."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def for_terminal(self) -> Table:
        """Return it for Rich."""
        table = Table(*self.header, title=self.title)
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """Return it as Markdown."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return f"## {self.title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


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


def show(label: str, lines: Sequence[Line], floors: dict[str, Any], console: Console, folder: Path) -> None:
    """Print all tables, and write them and the figure beside the results.

    Args:
        label: of the base model.
        lines: of its cells.
        floors: of its tasks.
        console: to print on.
        folder: of the results.
    """
    grids = list(tables(lines, floors))
    for grid in grids:
        console.print(grid.for_terminal())
    text = "\n".join(grid.markdown() for grid in grids)
    write_text(folder / f"{label}_tables.md", f"# The study's tables: base model {label}\n\n{text}")
    draw([line for line in lines if line["cell"]["kind"] != "counts"], folder / f"{label}_lengths.svg")


def tables(lines: Sequence[Line], floors: dict[str, Any]) -> Iterator[Grid]:
    """Give all tables."""
    ways = [line for line in lines if line["cell"]["kind"] != "counts"]
    yield Grid(
        "The floors",
        ("task", "epochs", "rate", "validation loss by rate and epochs"),
        [
            (task, str(floor["epochs"]), f"{floor['rate']:g}", _all_losses(floor["losses"]))
            for task, floor in floors.items()
        ],
    )
    yield _levels(ways)
    yield _against_controls(ways)
    for metric in ("loss", "match"):
        for length in LENGTHS:
            yield _differences([line for line in ways if _is(line, length)], LENGTH_NAMES[length], metric)
    yield _counts([line for line in lines if line["cell"]["kind"] == "counts"])
    yield _sentences(ways)


def _all_losses(losses: dict[str, dict[str, float]]) -> str:
    return "; ".join(
        f"{rate}: " + ", ".join(f"{epochs} {loss:.3f}" for epochs, loss in row.items()) for rate, row in losses.items()
    )


def _is(line: Line, length: float) -> bool:
    return math.isclose(line["cell"]["length"], length)


def _of_task(lines: Iterable[Line], task: str) -> list[Line]:
    return [line for line in lines if line["cell"]["task"] == task]


def _both(lines: Sequence[Line], label: str) -> str:
    """Return mean loss and mean matches in % of an adapter over cells."""
    loss, match = (statistics.mean(line["test"][label][metric] for line in lines) for metric in ("loss", "match"))
    return f"{loss:.3f}; {100 * match:.1f}"


def _differences(lines: Sequence[Line], length: str, metric: str) -> Grid:
    """Return the differences from soup at one length: over all cells, and of each task."""
    unit = "in nats per token" if metric == "loss" else "in points"
    title = f"At {length}: {metric} less that of soup, {unit}; cells shown lower, higher"
    rows = []
    for label in (*FUSED, *WAYS, *CONTROLS):
        groups = [lines, *(_of_task(lines, task) for task in TASKS)]
        rows.append((label, *(mean_of(group, label, metric=metric).text(metric) for group in groups)))
    return Grid(title, ("adapter", "all", *TASKS), rows)


def _levels(lines: Sequence[Line]) -> Grid:
    """Return mean losses and matches themselves."""
    labels = ("mean seed", "soup", "seedlora", "long seed, best", "wide batch")
    rows = []
    for task in TASKS:
        for length in LENGTHS:
            own = [line for line in _of_task(lines, task) if _is(line, length)]
            if own:
                cosine = statistics.mean(line["cosine"] for line in own)
                steps = str(own[0]["steps"])
                levels = [_both(own, label) for label in labels]
                rows.append((task, LENGTH_NAMES[length], steps, f"{len(own)}", f"{cosine:.2f}", *levels))
    header = ("task", "length", "steps", "sets", "cosine of seeds", *labels)
    return Grid("Test loss; exact match in %, means over sets of seeds", header, rows)


def _against_controls(lines: Sequence[Line]) -> Grid:
    """Return what is fused less the best of the controls: the long seed at its best validation, and the wide batch."""
    rows = []
    for label in ("soup", "best seeds", "best fused", "seedlora", "one start", "rates"):
        for length in LENGTHS:
            own = [line for line in lines if _is(line, length)]
            found = [mean_of(own, label, reference).text("loss") for reference in ("long seed, best", "wide batch")]
            matches = mean_of(own, label, "long seed, best", "match").text("match")
            rows.append((label, LENGTH_NAMES[length], *found, matches))
    header = (
        "adapter",
        "at",
        "loss less the long seed's best",
        "less the wide batch",
        "match less the long seed's best",
    )
    return Grid("What is fused against its controls, over the tasks; cells shown lower, higher", header, rows)


def _counts(lines: Sequence[Line]) -> Grid:
    """Return losses and matches by the number of seeds, each trained to the floor, and of one seed for their tokens."""
    rows = []
    for line in lines:
        for n in COUNTS:
            labels = ("mean seed", f"soup of {n}", f"seedlora of {n}", f"long {n}", f"wide {n}")
            rows.append((line["cell"]["task"], str(n), *(_both([line], label) for label in labels)))
    header = (
        "task",
        "seeds",
        "mean of 8",
        "soup",
        "seedlora",
        "one seed, n times the steps, its best",
        "n times the rows",
    )
    return Grid("At the floor, by number of seeds: test loss; exact match in %", header, rows)


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


def _sentences(lines: Sequence[Line]) -> Grid:
    """Return how often the sentence was right, by length."""
    by_length = {LENGTH_NAMES[length]: [line for line in lines if _is(line, length)] for length in LENGTHS}
    counts = {name: sentence_counts(own) for name, own in {**by_length, "all": lines}.items()}
    rows = [(name, *map(str, own.values())) for name, own in counts.items()]
    return Grid("Train longer, or fuse? The sentence against the long seed's test loss", ("at", *counts["all"]), rows)


def draw(lines: Sequence[Line], path: Path) -> None:
    """Draw the losses of the ways over the length of training, a panel for each task."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from seedlora.report.drawing import COLOURS

    with rc_context({"svg.hashsalt": "study", "font.size": 9}):
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        for i, task in enumerate(TASKS):
            panel = figure.add_subplot(1, len(TASKS), i + 1)
            for label, colour in zip(DRAWN, COLOURS, strict=False):
                points = []
                for length in LENGTHS:
                    own = [line for line in _of_task(lines, task) if _is(line, length) and label in line["test"]]
                    if own:
                        points.append((length, statistics.mean(line["test"][label]["loss"] for line in own)))
                if points:
                    panel.plot(*zip(*points, strict=True), marker="o", label=DRAWN[label], color=colour)
            panel.set(title=task.replace("_", " "), xscale="log", xlabel="epochs of a seed, in floors")
            panel.set_xticks(LENGTHS, ["1/3", "1", "3"])
            panel.minorticks_off()
        figure.axes[0].set_ylabel("test loss, nats per token")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        figure.savefig(path, metadata={"Date": None})
