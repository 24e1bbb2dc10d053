"""The kinds of figures of a report: plain data in, SVG text out."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from seedlora.names import FUSED, SOUP
from seedlora.records.report import (
    AdapterComparison,
    Distributions,
    LayerRow,
    PairedDifference,
    RunRow,
    TestSet,
)
from seedlora.records.results import ScoreRecord
from seedlora.records.selection import CandidateRecord, SubsetRecord
from seedlora.records.sweep import SweepRecord
from seedlora.report.drawing import (
    COLOURS,
    GREY,
    HEIGHT,
    PALE,
    Interval,
    Palette,
    colour_range,
    draw_interval,
    draw_legend,
    draw_scale,
    draw_svg,
    hover,
    hover_bars,
    hover_points,
    name_rows,
    shorten,
    text_colour,
)
from seedlora.report.svg import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Numbers under the pointer: shares and differences between them in percent, losses.
PERCENT_FORM, POINTS_FORM, LOSS_FORM = ".1f", "+.1f", ".3f"
#: Points in percent that the colours of a heat map reach over at least.
_LEAST_POINTS = 20
#: More sub-domains than this stand below each other.
_MOST_ACROSS = 12
#: More adapters than this leave no room for a number in each cell.
_MOST_WRITTEN = 9
#: Letters that fit below a figure.
_MOST_LETTERS = 48


def in_percent(row: ScoreRecord | PairedDifference) -> Interval:
    """Return a share, or a difference between shares, with its interval in percent."""
    return Interval(100 * row["value"], 100 * row["low"], 100 * row["high"])


def scores(name: str, test: TestSet, palette: Palette, only: Collection[str] | None = None) -> str:
    """Draw the score of each adapter with its interval.

    Args:
        name: of the figure.
        test: whose scores.
        palette: how each is drawn.
        only: the labels that are drawn. Default: all.
    """
    rows = [row for row in test["scores"] if only is None or row["adapter"] in only]

    def draw(axes: Axes) -> None:
        for i, row in enumerate(rows):
            label, drawn = row["adapter"], in_percent(row)
            text = f"{label}: {drawn.text(PERCENT_FORM)}"
            draw_interval(axes, i, drawn, palette.colour(label), text, palette.marker(label))
        if test["mean_seed"] is not None:
            axes.axvline(100 * test["mean_seed"], color=INK, linewidth=0.8, linestyle=":")
        name_rows(axes, [row["adapter"] for row in rows])
        axes.set_xlabel("right items (%); dotted: mean seed")

    return draw_svg(name, draw, height=0.9 + 0.28 * len(rows))


def methods(name: str, rows: Sequence[AdapterComparison], palette: Palette) -> str:
    """Draw the difference of each method and control from the mean seed."""

    def draw(axes: Axes) -> None:
        for i, row in enumerate(rows):
            label, drawn = row["adapter"], in_percent(row)
            text = f"{label}: {drawn.text(POINTS_FORM)}"
            draw_interval(axes, i, drawn, palette.colour(label), text, palette.marker(label))
        axes.axvline(0, color=INK, linewidth=0.8, linestyle=":")
        name_rows(axes, [row["adapter"] for row in rows])
        axes.set_xlabel("difference from the mean seed (points)")

    return draw_svg(name, draw, height=0.9 + 0.24 * len(rows))


def domains(name: str, test: TestSet) -> str:
    """Draw the score of each adapter in each sub-domain, in brackets all that are best; the scale shows chance."""
    rows = test["domains"]
    labels, names = [row["adapter"] for row in test["scores"]], [row["domain"] for row in rows]
    across, down = (labels, names) if len(rows) > _MOST_ACROSS else (names, labels)
    percents = {(row["domain"], label): 100 * row["scores"][label] for row in rows for label in labels}
    best = {(row["domain"], label) for row in rows for label in row["winners"]}
    chance = None if test["chance"] is None else 100 * test["chance"]
    places = [[(x, y) if across is names else (y, x) for x in across] for y in down]
    cells = [[percents[place] for place in line] for line in places]
    shown = [*(value for line in cells for value in line), *([] if chance is None else [chance])]
    low, high = colour_range(shown, _LEAST_POINTS)

    def draw(axes: Axes) -> None:
        axes.grid(visible=False)
        mesh = axes.pcolormesh(cells, cmap="cividis", edgecolors="face", linewidth=0.2, vmin=low, vmax=high)
        hover(mesh, *(f"{label}, {domain}: {percents[domain, label]:.1f}" for line in places for domain, label in line))
        for i, line in enumerate(places):
            for j, place in enumerate(line):
                value = percents[place]
                text = f"[{value:.0f}]" if place in best else f"{value:.0f}"
                axes.text(
                    j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=8, color=text_colour(value, low, high)
                )
        axes.set_xticks([j + 0.5 for j in range(len(across))], across, rotation=40, ha="right")
        axes.set_yticks([i + 0.5 for i in range(len(down))], down)
        axes.set_ylim(len(down), 0)
        axes.spines[:].set_visible(False)
        bar = draw_scale(
            axes, mesh, "right items (%)" if chance is None else f"right items (%); line: chance, {chance:.0f}"
        )
        if chance is not None:
            bar.axvline(chance, color="#D55E00", linewidth=2.0)

    return draw_svg(name, draw, height=2.1 + 0.22 * len(down))


@dataclass(frozen=True)
class Dot:
    """Place an adapter in a figure of scores over something else.

    Args:
        adapter: its label.
        score: in percent.
        place: what stands on the axis across: a number, or one with its interval.
    """

    adapter: str
    score: Interval
    place: float | Interval

    @property
    def x(self) -> float:
        """Return where it stands."""
        return self.place.value if isinstance(self.place, Interval) else self.place

    @property
    def place_text(self) -> str:
        """Write where it stands."""
        if isinstance(self.place, Interval):
            return self.place.text(LOSS_FORM)
        return f"{self.place:,}" if isinstance(self.place, int) else f"{self.place:{LOSS_FORM}}"


def against_score(
    name: str, dots: Sequence[Dot], label: str, palette: Palette, *, lines: int, counts: bool = False
) -> str:
    """Draw the score of each adapter over another number of it, which may have an interval too.

    Args:
        name: of the figure.
        dots: the adapters.
        label: of the axis across.
        palette: how each is drawn.
        lines: adapters that there is room for beside the figure.
        counts: whether the axis is one of counts, which begins at 0.
    """

    def draw(axes: Axes) -> None:
        places = [dot.x for dot in dots]
        width = max(places) - min(places)
        for i, dot in enumerate(dots):
            # Those at the same place stand side by side.
            aside = 0.02 * width * places[:i].count(dot.x)
            spread = dot.place if isinstance(dot.place, Interval) else None
            container = axes.errorbar(
                [dot.x + aside],
                [dot.score.value],
                yerr=[[dot.score.below], [dot.score.above]],
                xerr=None if spread is None else [[spread.below], [spread.above]],
                elinewidth=None if spread is None else 0.7,
                capsize=2,
                label=dot.adapter,
                marker=palette.marker(dot.adapter),
                color=palette.colour(dot.adapter),
                markersize=5,
                linestyle="none",
            )
            hover_bars(container, f"{dot.adapter}: {dot.score.text(PERCENT_FORM)} at {dot.place_text}")
        axes.set(xlabel=label, ylabel="right items (%)")
        if counts:
            axes.set_xlim(0, None)
            axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.locator_params(axis="x", nbins=5)
        axes.margins(x=0.1)
        draw_legend(axes)

    return draw_svg(name, draw, height=HEIGHT + 0.1 * max(0, lines - 5))


def gain_curve(name: str, rows: Sequence[CandidateRecord]) -> str:
    """Draw the validation loss over the power of the gain, soup at 0."""
    gains = [row for row in rows if row["method"] == "seedlora_gain"]
    start = [(0, row["loss"]) for row in rows if row["name"] == SOUP]

    def draw(axes: Axes) -> None:
        for i, layers in enumerate(dict.fromkeys(row["options"].get("layers", "all") for row in gains)):
            own = [(row["options"]["p"], row["loss"]) for row in gains if row["options"].get("layers", "all") == layers]
            x, y = zip(*start, *own, strict=True)
            part = "all layers" if layers == "all" else f"{layers} only"
            axes.plot(x, y, marker="o^s"[i % 3], color=(INK, GREY, PALE)[i % 3], label=part, markersize=4)
            points = list(zip(x, y, strict=True))
            hover_points(axes, points, [f"{part}, p {p:g}: {loss:.4f}" for p, loss in points])
        axes.set(
            xlabel="power p of the gain (0: soup, 1/2: the norm is kept)", ylabel="validation loss\n(nats per token)"
        )
        draw_legend(axes)

    return draw_svg(name, draw)


def candidate_losses(name: str, rows: Sequence[CandidateRecord], chosen: str) -> str:
    """Draw the validation loss of the rules that were tried, the chosen one in ink."""

    def draw(axes: Axes) -> None:
        for i, row in enumerate(rows):
            colour = INK if row["name"] == chosen else GREY
            (mark,) = axes.plot([row["loss"]], [i], marker="D", markersize=5, color=colour)
            hover(mark, f"{row['name']}: {row['loss']:.4f}")
        name_rows(axes, [row["name"] for row in rows])
        axes.set_xlabel("validation loss (nats per token)")

    return draw_svg(name, draw, height=0.9 + 0.24 * len(rows))


def subset_losses(name: str, rows: Sequence[SubsetRecord], palette: Palette) -> str:
    """Draw the validation loss by how many seeds are merged: each subset a point, their mean a line."""
    labels, most = list(rows[0]["loss"]), max(len(row["seeds"]) for row in rows)

    def draw(axes: Axes) -> None:
        for i, label in enumerate(labels):
            shift = 0.06 * (i - (len(labels) - 1) / 2)
            colour, means = palette.colour(label), []
            for n in range(1, most + 1):
                chosen = [row for row in rows if len(row["seeds"]) == n]
                losses = [row["loss"][label] for row in chosen]
                (marks,) = axes.plot([n + shift] * len(losses), losses, ".", color=colour, markersize=5)
                hover(marks, *(f"{label} of {', '.join(row['seeds'])}: {row['loss'][label]:.4f}" for row in chosen))
                means.append(sum(losses) / len(losses))
            axes.plot([n + shift for n in range(1, most + 1)], means, color=colour, label=label, linewidth=1.2)
        axes.set(xlabel="seeds fused", ylabel="validation loss (nats per token)")
        axes.set_xticks(range(1, most + 1))
        draw_legend(axes)

    return draw_svg(name, draw)


def swept_losses(name: str, sweep: SweepRecord) -> str:
    """Draw the validation loss over the sets of values that are swept, a line for each seed."""
    rows = sweep["rows"]
    texts = [", ".join(map(str, row["values"].values())) for row in rows]
    turned = len("".join(texts)) > _MOST_LETTERS

    def draw(axes: Axes) -> None:
        for i, seed in enumerate(dict.fromkeys(seed for row in rows for seed in row["losses"])):
            places = [place for place, row in enumerate(rows) if seed in row["losses"]]
            found, colour = [rows[place]["losses"][seed] for place in places], COLOURS[i % len(COLOURS)]
            axes.plot(places, found, marker="o^sDv"[i % 5], markersize=4, label=seed, color=colour)
            shown = [f"{seed}, {texts[place]}: {loss:.4f}" for place, loss in zip(places, found, strict=True)]
            hover_points(axes, list(zip(places, found, strict=True)), shown)
        axes.set_xticks(range(len(rows)), texts, rotation=40 if turned else 0, ha="right" if turned else "center")
        axes.set(xlabel=", ".join(sweep["options"]), ylabel="validation loss\n(nats per token)")
        draw_legend(axes)

    return draw_svg(name, draw, height=HEIGHT + (0.5 if turned else 0))


def losses(name: str, curves: Mapping[str, Sequence[Sequence[float]]], palette: Palette) -> str:
    """Draw losses over optimizer steps."""

    def draw(axes: Axes) -> None:
        longest = max(map(len, curves.values()))
        for label, curve in curves.items():
            x, y = zip(*curve, strict=True)
            marker = "." if longest <= 30 else ""
            width = 2.0 if label == FUSED else 1.2
            colour, line = palette.colour(label), palette.line(label)
            axes.plot(x, y, marker=marker, label=label, linewidth=width, color=colour, linestyle=line)
            points = [(step, loss) for step, loss in curve]
            hover_points(axes, points, [f"{label}, step {step:,.0f}: {loss:.4f}" for step, loss in points])
        axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
        axes.locator_params(axis="x", integer=True)
        draw_legend(axes)

    return draw_svg(name, draw)


def heat_map(
    name: str, layers: Sequence[LayerRow], values: Sequence[float | None], label: str, *, least: float = 0.2
) -> str:
    """Draw one number of every layer: module types down, depth across.

    Args:
        name: of the figure.
        layers: what the numbers are of.
        values: the numbers.
        label: of the scale.
        least: that the scale reaches over, so that numbers which are nearly the same look so.
    """
    modules = list(dict.fromkeys(row["module"] for row in layers))
    depths = sorted({row["layer"] for row in layers})
    cells = [[float("nan")] * len(depths) for _ in modules]
    low, high = colour_range([value for value in values if value is not None], least)
    for row, value in zip(layers, values, strict=True):
        if value is not None:
            cells[modules.index(row["module"])][depths.index(row["layer"])] = value

    def draw(axes: Axes) -> None:
        axes.grid(visible=False)
        mesh = axes.pcolormesh(cells, cmap="cividis", edgecolors="face", linewidth=0.2, vmin=low, vmax=high)
        hover(
            mesh,
            *(
                f"layer {depth}, {module}" + (f": {value:.3f}" if math.isfinite(value) else "")
                for module, line in zip(modules, cells, strict=True)
                for depth, value in zip(depths, line, strict=True)
            ),
        )
        step = -(-len(depths) // 8)
        places = range(0, len(depths), step)
        axes.set_xticks([place + 0.5 for place in places], [str(depths[place]) for place in places])
        axes.set_yticks([i + 0.5 for i in range(len(modules))], modules)
        axes.set_ylim(len(modules), 0)
        axes.set_xlabel("layer")
        axes.spines[:].set_visible(False)
        draw_scale(axes, mesh, label)

    return draw_svg(name, draw, height=1.5 + 0.24 * len(modules))


def cosine_matrix(name: str, labels: Sequence[str], cosines: Sequence[Sequence[float]]) -> str:
    """Draw the cosine of every pair of adapters, each taken as one vector; the scale leaves out the diagonal."""
    apart = [value for i, row in enumerate(cosines) for j, value in enumerate(row) if i != j]
    low, high = colour_range(apart, 0.2)

    def draw(axes: Axes) -> None:
        axes.grid(visible=False)
        cells = [[float("nan") if i == j else value for j, value in enumerate(row)] for i, row in enumerate(cosines)]
        mesh = axes.pcolormesh(cells, cmap="cividis", edgecolors="face", linewidth=0.2, vmin=low, vmax=high)
        for i, row in enumerate(cosines):
            for j, value in enumerate(row):
                colour = INK if i == j else text_colour(value, low, high)
                if len(labels) <= _MOST_WRITTEN:
                    axes.text(j + 0.5, i + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
        places = [i + 0.5 for i in range(len(labels))]
        axes.set_xticks(places, labels, rotation=40, ha="right")
        axes.set_yticks(places, labels)
        axes.set_ylim(len(labels), 0)
        axes.spines[:].set_visible(False)
        draw_scale(axes, mesh, "cosine of two updates")

    return draw_svg(name, draw, height=1.9 + 0.26 * len(labels))


def spectra(name: str, values: Mapping[str, Sequence[float]], palette: Palette) -> str:
    """Draw the singular values of each adapter in one layer."""

    def draw(axes: Axes) -> None:
        for label, row in values.items():
            colour, line = palette.colour(label), palette.line(label)
            axes.plot(range(1, 1 + len(row)), row, marker=".", label=label, color=colour, linestyle=line)
            points = [(i, value) for i, value in enumerate(row, 1)]
            hover_points(axes, points, [f"{label}, {i}: {value:.3g}" for i, value in points])
        axes.set(xlabel="index", ylabel="singular value of the update", ylim=(0, None))
        axes.locator_params(axis="x", integer=True)
        draw_legend(axes)

    return draw_svg(name, draw)


def distributions(name: str, counted: Distributions, palette: Palette) -> str:
    """Draw the distribution of the entries of each adapter's update."""

    def draw(axes: Axes) -> None:
        for label, density in counted["density"].items():
            colour, line, width = palette.colour(label), palette.line(label), 2.0 if label == FUSED else 1.2
            steps = axes.stairs(density, counted["edges"], label=label, linewidth=width, color=colour, linestyle=line)
            hover(steps, f"{label}: standard deviation {counted['std'][label]:.3g}")
        axes.set(xlabel="entry of the update", ylabel="density", ylim=(0, None))
        axes.ticklabel_format(style="sci", scilimits=(-2, 3), useMathText=False)
        axes.locator_params(nbins=6)
        draw_legend(axes)

    return draw_svg(name, draw)


def run_differences(name: str, runs: Sequence[RunRow]) -> str | None:
    """Draw the difference between fused adapter and mean seed in each run that has it; ``None`` if none has."""
    rows = [(run["run"], row) for run in runs if (row := run["against_mean_seed"]) is not None]
    if not rows:
        return None

    def draw(axes: Axes) -> None:
        for i, (run, row) in enumerate(rows):
            drawn = in_percent(row)
            draw_interval(axes, i, drawn, INK, f"{run}: {drawn.text(POINTS_FORM)}")
        axes.axvline(0, color=INK, linewidth=0.8, linestyle=":")
        name_rows(axes, [shorten(run) for run, _ in rows])
        axes.set_xlabel("fused minus mean seed (points)")

    return draw_svg(name, draw, height=0.9 + 0.28 * len(rows))
