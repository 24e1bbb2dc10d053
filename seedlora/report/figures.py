"""The figures of a report: plain data in, SVG text out.

Text and lines take the colour of the page around them, so that one drawing serves a light and a dark page; an adapter
has the same colour in every figure. The same data gives the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from seedlora.merge.registry import METHODS
from seedlora.names import BASE, FUSED, GAIN_SEED, GAIN_SOUP, GREEDY, LOGITS, LONG_SEED, MEAN_SEED, SOUP, WIDE_SEED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6D31")
#: Stand-ins, replaced by the page's own colours.
INK, GRID = "#010203", "#040506"
_GREY, _PALE = "#8a8a8a", "#b9b9b9"
#: Of the controls that are trained.
CONTROL_COLOURS = {LONG_SEED: "#C0408A", WIDE_SEED: "#999933"}
LINES = {LONG_SEED: "--", WIDE_SEED: ":"}
#: Of the other controls and the methods, in pairs of a colour and a marker: the same in every report.
_OTHERS = tuple(dict.fromkeys((GAIN_SEED, GAIN_SOUP, GREEDY, LOGITS, *METHODS)))
OTHER_COLOURS = ("#CC6677", "#2F9E8F", "#8A7BD8", "#8C8C2E", "#B0703C", "#4F93C9")
_OTHER_MARKERS = ("<", ">", "*", "d", "p")
MARKERS = {
    **{label: _OTHER_MARKERS[i % len(_OTHER_MARKERS)] for i, label in enumerate(_OTHERS)},
    **{FUSED: "D", SOUP: "D", LONG_SEED: "s", WIDE_SEED: "^"},
}
#: Of seeds: the colours come again from the eighth on, with the next of each.
SEED_LINES, SEED_MARKERS = ("-", "--", ":", "-."), ("o", "v", "P", "X")
#: Small enough that the text can still be read on a phone.
WIDTH, HEIGHT = 4.6, 3.0
#: Inches that a letter of a legend takes, and what stands before and after a label.
_CHARACTER, _HANDLE = 0.068, 0.36
#: Letters of a name down the side.
_LONGEST = 28
#: More sub-domains than this stand below each other.
_MOST_ACROSS = 12
#: More adapters than this leave no room for a number in each cell.
_MOST_WRITTEN = 9
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "seedlora",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK),
}


def colours(seeds: Sequence[str]) -> dict[str, str]:
    """The colour of each adapter: Okabe and Ito's for seeds, greys for soup and base, the ink for the fused one."""
    return {
        **{seed: COLOURS[i % len(COLOURS)] for i, seed in enumerate(seeds)},
        **{label: OTHER_COLOURS[i % len(OTHER_COLOURS)] for i, label in enumerate(_OTHERS)},
        **CONTROL_COLOURS,
        SOUP: _GREY,
        BASE: _PALE,
        FUSED: INK,
    }


def _line(label: str, palette: Mapping[str, str]) -> str:
    return LINES.get(label) or SEED_LINES[_round(label, palette) % len(SEED_LINES)]


def _marker(label: str, palette: Mapping[str, str]) -> str:
    return MARKERS.get(label) or SEED_MARKERS[_round(label, palette) % len(SEED_MARKERS)]


def _round(label: str, palette: Mapping[str, str]) -> int:
    """How often the colours were used up before this seed, the first in the palette; 0 for who is no seed."""
    return list(palette).index(label) // len(COLOURS) if palette.get(label) in COLOURS else 0


def figures(facts: Mapping[str, Any]) -> dict[str, str]:
    """All figures that a run's facts allow, as SVG by name."""
    palette, weights = colours(facts["seeds"]), facts["weights"]
    drawn: dict[str, str] = {}
    for i, test in enumerate(facts["tests"]):
        drawn[f"scores-{i}"] = scores(f"scores-{i}", test, palette)
        if len(rows := [row for row in test["comparisons"] if row["against"] == MEAN_SEED]) > 2:
            drawn[f"methods-{i}"] = methods(f"methods-{i}", rows, palette)
        if test["domains"]:
            drawn[f"domains-{i}"] = domains(f"domains-{i}", test)
    for part in ("train", "validation"):
        if curves := facts["training"][part]:
            drawn[part] = losses(part, curves, palette)
    adapters = [row for row in facts["adapters"] if row["value"] is not None]
    if any(row["adapter"] == LONG_SEED and row["tokens"] for row in adapters):
        drawn["budget"] = against_score("budget", adapters, "tokens", "tokens trained on", palette)
    key, label = "train_loss", "training loss at the end (nats per token)"
    if sample := facts["train_sample"]:
        key, label = "sample_loss", f"loss on {sample['rows']:,} training rows (nats per token)"
    if len([row for row in adapters if row[key] is not None]) > 1:
        drawn["loss-score"] = against_score("loss-score", adapters, key, label, palette)
    selection = facts["selection"] or {}
    if selection.get("candidates"):
        tried, chosen = selection["candidates"], selection["chosen"]["name"]
        if any(row["method"] == "seedlora_gain" for row in tried):
            drawn["gain-curve"] = gain_curve("gain-curve", tried)
        if len(others := [row for row in tried if row["method"] != "seedlora_gain" or row["name"] == chosen]) > 2:
            drawn["candidates"] = candidate_losses("candidates", others, chosen)
    if selection.get("subsets"):
        drawn["subsets"] = subset_losses("subsets", selection["subsets"], palette)
    if weights is not None:
        drawn |= weight_figures(weights, palette)
    return drawn


def weight_figures(weights: Mapping[str, Any], palette: Mapping[str, str]) -> dict[str, str]:
    """Cosines, spectra, distributions and gains of adapters, as SVG by name."""
    drawn = {}
    if weights["cosines"]:
        drawn["pairs"] = cosine_matrix("pairs", weights["seeds"], weights["cosines"])
        drawn["cosines"] = heat_map("cosines", weights["layers"], "mean_cosine", "mean pairwise cosine")
    drawn["spectra"] = spectra("spectra", weights["spectra"]["singular_values"], palette)
    drawn["distributions"] = distributions("distributions", weights["distributions"], palette)
    if weights["cosines"] and any(row["applied_gain"] is not None for row in weights["layers"]):
        drawn["gains"] = heat_map("gains", weights["layers"], "applied_gain", "norm of fused / norm of the seeds' mean")
    return drawn


def standalone(svg: str) -> str:
    """A figure that is a file of its own: black on white, in no page's colours."""
    return (
        svg.replace("currentColor", "#000000")
        .replace("var(--line)", "#d9dce0")
        .replace("<svg", '<svg style="background: white"', 1)
    )


def scores(name: str, test: Mapping[str, Any], palette: Mapping[str, str]) -> str:
    """Score and interval of each adapter."""
    rows = test["scores"]

    def draw(axes: Axes) -> None:
        for i, row in enumerate(rows):
            _interval(axes, i, row, palette.get(row["adapter"], _GREY), _marker(row["adapter"], palette))
        if test["mean_seed"] is not None:
            axes.axvline(100 * test["mean_seed"], color=INK, linewidth=0.8, linestyle=":")
        _names(axes, [row["adapter"] for row in rows])
        axes.set_xlabel("right items (%); dotted: mean seed")

    return _svg(name, draw, height=0.9 + 0.28 * len(rows))


def methods(name: str, rows: Sequence[Mapping[str, Any]], palette: Mapping[str, str]) -> str:
    """Difference of each method and control from the mean seed."""

    def draw(axes: Axes) -> None:
        for i, row in enumerate(rows):
            _interval(axes, i, row, palette.get(row["adapter"], _GREY), _marker(row["adapter"], palette))
        axes.axvline(0, color=INK, linewidth=0.8, linestyle=":")
        _names(axes, [row["adapter"] for row in rows])
        axes.set_xlabel("difference from the mean seed (points)")

    return _svg(name, draw, height=0.9 + 0.24 * len(rows))


def domains(name: str, test: Mapping[str, Any]) -> str:
    """Score of each adapter in each sub-domain, in brackets all that are best; the scale shows chance."""
    rows = test["domains"]
    labels, names = [row["adapter"] for row in test["scores"]], [row["domain"] for row in rows]
    across, down = (labels, names) if len(rows) > _MOST_ACROSS else (names, labels)
    scores = {(row["domain"], label): 100 * row["scores"][label] for row in rows for label in labels}
    best = {(row["domain"], label) for row in rows for label in row["winners"]}
    chance = None if test["chance"] is None else 100 * test["chance"]
    places = [[(x, y) if across is names else (y, x) for x in across] for y in down]
    cells = [[scores[place] for place in line] for line in places]
    shown = [*(value for line in cells for value in line), *([] if chance is None else [chance])]
    low, high = min(shown), max(shown)

    def draw(axes: Axes) -> None:
        axes.grid(visible=False)
        mesh = axes.pcolormesh(cells, cmap="cividis", edgecolors="face", linewidth=0.2, vmin=low, vmax=high)
        for i, line in enumerate(places):
            for j, place in enumerate(line):
                value = scores[place]
                text = f"[{value:.0f}]" if place in best else f"{value:.0f}"
                axes.text(
                    j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=8, color=_written(value, low, high)
                )
        axes.set_xticks([j + 0.5 for j in range(len(across))], across, rotation=40, ha="right")
        axes.set_yticks([i + 0.5 for i in range(len(down))], down)
        axes.set_ylim(len(down), 0)
        axes.spines[:].set_visible(False)
        bar = _scale(
            axes, mesh, "right items (%)" if chance is None else f"right items (%); line: chance, {chance:.0f}"
        )
        if chance is not None:
            bar.axvline(chance, color="#D55E00", linewidth=2.0)

    return _svg(name, draw, height=2.1 + 0.22 * len(down))


def against_score(
    name: str, rows: Sequence[Mapping[str, Any]], key: str, label: str, palette: Mapping[str, str]
) -> str:
    """Score of each adapter over another number of it, which may have an interval too."""
    numbers = [row[key]["value"] if isinstance(row[key], Mapping) else row[key] for row in rows]

    def draw(axes: Axes) -> None:
        places = [number for number in numbers if number is not None]
        width = max(places) - min(places)
        for i, (row, number) in enumerate(zip(rows, numbers, strict=True)):
            if number is None:
                continue
            # Those at the same place stand side by side.
            aside = 0.02 * width * numbers[:i].count(number)
            value = 100 * row["value"]
            spread = [[value - 100 * row["low"]], [100 * row["high"] - value]]
            colour = palette.get(row["adapter"], _GREY)
            style: dict[str, Any] = {
                "marker": _marker(row["adapter"], palette),
                "color": colour,
                "markersize": 5,
                "linestyle": "none",
            }
            if isinstance(row[key], Mapping):
                style |= {"xerr": [[number - row[key]["low"]], [row[key]["high"] - number]], "elinewidth": 0.7}
            axes.errorbar([number + aside], [value], yerr=spread, capsize=2, label=row["adapter"], **style)
        axes.set(xlabel=label, ylabel="right items (%)")
        if key == "tokens":
            axes.set_xlim(0, None)
            axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.locator_params(axis="x", nbins=5)
        axes.margins(x=0.1)
        _legend(axes)

    return _svg(name, draw, height=HEIGHT + 0.1 * max(0, len(rows) - 5))


def gain_curve(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Validation loss over the power of the gain, soup at 0."""
    gains = [row for row in rows if row["method"] == "seedlora_gain"]
    start = [(0, row["loss"]) for row in rows if row["name"] == SOUP]

    def draw(axes: Axes) -> None:
        for i, layers in enumerate(dict.fromkeys(row["options"].get("layers", "all") for row in gains)):
            own = [(row["options"]["p"], row["loss"]) for row in gains if row["options"].get("layers", "all") == layers]
            x, y = zip(*start, *own, strict=True)
            part = "all layers" if layers == "all" else f"{layers} only"
            axes.plot(x, y, marker="o^s"[i % 3], color=(INK, _GREY, _PALE)[i % 3], label=part, markersize=4)
        axes.set(
            xlabel="power p of the gain (0: soup, 1/2: the norm is kept)", ylabel="validation loss\n(nats per token)"
        )
        _legend(axes)

    return _svg(name, draw)


def candidate_losses(name: str, rows: Sequence[Mapping[str, Any]], chosen: str) -> str:
    """Validation loss of the rules that were tried, the chosen one in ink."""

    def draw(axes: Axes) -> None:
        for i, row in enumerate(rows):
            axes.plot([row["loss"]], [i], marker="D", markersize=5, color=INK if row["name"] == chosen else _GREY)
        _names(axes, [row["name"] for row in rows])
        axes.set_xlabel("validation loss (nats per token)")

    return _svg(name, draw, height=0.9 + 0.24 * len(rows))


def subset_losses(name: str, rows: Sequence[Mapping[str, Any]], palette: Mapping[str, str]) -> str:
    """Validation loss by how many seeds are fused: each subset a point, their mean a line."""
    labels, most = list(rows[0]["loss"]), max(len(row["seeds"]) for row in rows)

    def draw(axes: Axes) -> None:
        for i, label in enumerate(labels):
            shift = 0.06 * (i - (len(labels) - 1) / 2)
            colour, means = palette.get(label, _GREY), []
            for n in range(1, most + 1):
                losses = [row["loss"][label] for row in rows if len(row["seeds"]) == n]
                axes.plot([n + shift] * len(losses), losses, ".", color=colour, markersize=5)
                means.append(sum(losses) / len(losses))
            axes.plot([n + shift for n in range(1, most + 1)], means, color=colour, label=label, linewidth=1.2)
        axes.set(xlabel="seeds fused", ylabel="validation loss (nats per token)")
        axes.set_xticks(range(1, most + 1))
        _legend(axes)

    return _svg(name, draw)


def losses(name: str, curves: Mapping[str, Sequence[Sequence[float]]], palette: Mapping[str, str]) -> str:
    """Losses over optimizer steps."""

    def draw(axes: Axes) -> None:
        longest = max(map(len, curves.values()))
        for label, curve in curves.items():
            x, y = zip(*curve, strict=True)
            marker = "." if longest <= 30 else ""
            width = 2.0 if label == FUSED else 1.2
            style: dict[str, Any] = {"color": palette.get(label, _GREY), "linestyle": _line(label, palette)}
            axes.plot(x, y, marker=marker, label=label, linewidth=width, **style)
        axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
        axes.locator_params(axis="x", integer=True)
        _legend(axes)

    return _svg(name, draw)


def heat_map(name: str, layers: Sequence[Mapping[str, Any]], key: str, label: str) -> str:
    """One number of every layer: module types down, depth across."""
    modules = list(dict.fromkeys(row["module"] for row in layers))
    depths = sorted({row["layer"] for row in layers})
    cells = [[float("nan")] * len(depths) for _ in modules]
    for row in layers:
        if row[key] is not None:
            cells[modules.index(row["module"])][depths.index(row["layer"])] = row[key]

    def draw(axes: Axes) -> None:
        axes.grid(visible=False)
        mesh = axes.pcolormesh(cells, cmap="cividis", edgecolors="face", linewidth=0.2)
        step = -(-len(depths) // 8)
        places = range(0, len(depths), step)
        axes.set_xticks([place + 0.5 for place in places], [str(depths[place]) for place in places])
        axes.set_yticks([i + 0.5 for i in range(len(modules))], modules)
        axes.set_ylim(len(modules), 0)
        axes.set_xlabel("layer")
        axes.spines[:].set_visible(False)
        _scale(axes, mesh, label)

    return _svg(name, draw, height=1.5 + 0.24 * len(modules))


def cosine_matrix(name: str, labels: Sequence[str], cosines: Sequence[Sequence[float]]) -> str:
    """Cosine of every pair of adapters, each taken as one vector; the scale leaves out the diagonal."""
    apart = [value for i, row in enumerate(cosines) for j, value in enumerate(row) if i != j]
    # Cosines that are nearly the same look so.
    low, high = min(apart), max(*apart, min(apart) + 0.05)

    def draw(axes: Axes) -> None:
        axes.grid(visible=False)
        cells = [[float("nan") if i == j else value for j, value in enumerate(row)] for i, row in enumerate(cosines)]
        mesh = axes.pcolormesh(cells, cmap="cividis", edgecolors="face", linewidth=0.2, vmin=low, vmax=high)
        for i, row in enumerate(cosines):
            for j, value in enumerate(row):
                colour = INK if i == j else _written(value, low, high)
                if len(labels) <= _MOST_WRITTEN:
                    axes.text(j + 0.5, i + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
        places = [i + 0.5 for i in range(len(labels))]
        axes.set_xticks(places, labels, rotation=40, ha="right")
        axes.set_yticks(places, labels)
        axes.set_ylim(len(labels), 0)
        axes.spines[:].set_visible(False)
        _scale(axes, mesh, "cosine of two updates")

    return _svg(name, draw, height=1.9 + 0.26 * len(labels))


def spectra(name: str, values: Mapping[str, Sequence[float]], palette: Mapping[str, str]) -> str:
    """Singular values of each adapter in one layer."""

    def draw(axes: Axes) -> None:
        for label, row in values.items():
            style: dict[str, Any] = {"color": palette.get(label, _GREY), "linestyle": _line(label, palette)}
            axes.plot(range(1, 1 + len(row)), row, marker=".", label=label, **style)
        axes.set(xlabel="index", ylabel="singular value of the update", ylim=(0, None))
        axes.locator_params(axis="x", integer=True)
        _legend(axes)

    return _svg(name, draw)


def distributions(name: str, counted: Mapping[str, Any], palette: Mapping[str, str]) -> str:
    """Distribution of the entries of each adapter's update."""

    def draw(axes: Axes) -> None:
        for label, density in counted["density"].items():
            style: dict[str, Any] = {"color": palette.get(label, _GREY), "linestyle": _line(label, palette)}
            width = 2.0 if label == FUSED else 1.2
            axes.stairs(density, counted["edges"], label=label, linewidth=width, **style)
        axes.set(xlabel="entry of the update", ylabel="density", ylim=(0, None))
        axes.ticklabel_format(style="sci", scilimits=(-2, 3), useMathText=False)
        axes.locator_params(nbins=6)
        _legend(axes)

    return _svg(name, draw)


def run_differences(name: str, runs: Sequence[Mapping[str, Any]]) -> str | None:
    """Difference between fused adapter and mean seed in each run that has it."""
    rows = [run for run in runs if run["against_mean_seed"] is not None]
    if not rows:
        return None

    def draw(axes: Axes) -> None:
        for i, row in enumerate(rows):
            _interval(axes, i, row["against_mean_seed"], INK)
        axes.axvline(0, color=INK, linewidth=0.8, linestyle=":")
        _names(axes, [_shortened(row["run"]) for row in rows])
        axes.set_xlabel("fused minus mean seed (points)")

    return _svg(name, draw, height=0.9 + 0.28 * len(rows))


def _interval(axes: Axes, place: int, row: Mapping[str, Any], colour: str, marker: str = MARKERS[FUSED]) -> None:
    value = 100 * row["value"]
    spread = [[value - 100 * row["low"]], [100 * row["high"] - value]]
    axes.errorbar([value], [place], xerr=spread, fmt=marker, color=colour, markersize=5, capsize=3)


def _shortened(name: str) -> str:
    """A long name without its middle, so that it leaves room for what is drawn."""
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST // 2]}…{name[-_LONGEST // 2 + 1 :]}"


def _names(axes: Axes, names: Sequence[str]) -> None:
    """Names down the side, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")


def _legend(axes: Axes) -> None:
    """Above the axes, in as many columns as fit: they are filled one after the other, each as wide as its longest."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) < 2:
        return
    for columns in range(min(len(labels), 5), 0, -1):
        lines = -(-len(labels) // columns)
        longest = [max(map(len, labels[i : i + lines])) for i in range(0, len(labels), lines)]
        if sum(longest) * _CHARACTER + len(longest) * _HANDLE <= WIDTH:
            break
    _figure(axes).legend(
        handles, labels, loc="outside upper center", ncols=columns, handlelength=1.2, columnspacing=1.0
    )


def _scale(axes: Axes, mesh: Any, label: str) -> Axes:
    """The colours of a heat map over it."""
    bar = _figure(axes).colorbar(mesh, ax=axes, location="top", label=label, aspect=30, pad=0.04)
    bar.outline.set_visible(False)
    bar.ax.locator_params(axis="x", nbins=6)
    return bar.ax


def _written(value: float, low: float, high: float) -> str:
    """The colour of a number in a cell of a heat map, black or white, whichever stands out more."""
    return "white" if value < low + 0.47 * (high - low) else "black"


def _figure(axes: Axes) -> Figure:
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure


@contextmanager
def _style() -> Iterator[None]:
    """Matplotlib's own defaults and ours, whatever the user's are."""
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def _svg(name: str, draw: Callable[[Axes], None], *, height: float = HEIGHT) -> str:
    """Draw, and make the SVG fit to stand in a page among others: its ids are its own, its colours the page's."""
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r'\s(?:width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r" +\n", "\n", text)
    return text.replace(INK, "currentColor").replace(GRID, "var(--line)")
