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

from seedlora.diagnostics import COLOURS
from seedlora.report.results import BASE, FUSED, SOUP

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Stand-ins, replaced by the page's own colours.
INK, GRID = "#010203", "#040506"
_GREY, _PALE = "#8a8a8a", "#b9b9b9"
#: Small enough that the text can still be read on a phone.
WIDTH, HEIGHT = 4.6, 3.0
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
        SOUP: _GREY,
        BASE: _PALE,
        FUSED: INK,
    }


def figures(facts: Mapping[str, Any]) -> dict[str, str]:
    """All figures that a run's facts allow, as SVG by name."""
    palette, weights = colours(facts["seeds"]), facts["weights"]
    drawn: dict[str, str] = {}
    for i, test in enumerate(facts["tests"]):
        drawn[f"scores-{i}"] = scores(f"scores-{i}", test, palette)
    for part in ("train", "validation"):
        if curves := facts["training"][part]:
            drawn[part] = losses(part, curves, palette)
    if weights is not None:
        if weights["cosines"]:
            drawn["cosines"] = heat_map("cosines", weights["layers"], "mean_cosine", "mean pairwise cosine")
        drawn["spectra"] = spectra("spectra", weights["spectra"]["singular_values"], palette)
        drawn["distributions"] = distributions("distributions", weights["distributions"], palette)
        if len(facts["trained"]) > 1 and facts["merged"] is not None:
            drawn["gains"] = heat_map("gains", weights["layers"], "applied_gain", "norm of fused / norm of mean seed")
    return drawn


def scores(name: str, test: Mapping[str, Any], palette: Mapping[str, str]) -> str:
    """Score and interval of each adapter."""
    rows = test["scores"]

    def draw(axes: Axes) -> None:
        for i, row in enumerate(rows):
            colour, value = palette.get(row["adapter"], _GREY), 100 * row["value"]
            spread = [[value - 100 * row["low"]], [100 * row["high"] - value]]
            marker = "D" if row["adapter"] in (FUSED, SOUP) else "o"
            axes.errorbar([value], [i], xerr=spread, fmt=marker, color=colour, markersize=5, capsize=3)
        if test["mean_seed"] is not None:
            axes.axvline(100 * test["mean_seed"], color=INK, linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(rows)), [row["adapter"] for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("right items (%); dotted: mean seed")

    return _svg(name, draw, height=0.9 + 0.28 * len(rows))


def losses(name: str, curves: Mapping[str, Sequence[Sequence[float]]], palette: Mapping[str, str]) -> str:
    """Losses over optimizer steps."""

    def draw(axes: Axes) -> None:
        longest = max(map(len, curves.values()))
        for label, curve in curves.items():
            x, y = zip(*curve, strict=True)
            marker = "." if longest <= 30 else ""
            width = 2.0 if label == FUSED else 1.2
            axes.plot(x, y, marker=marker, color=palette.get(label, _GREY), label=label, linewidth=width)
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
        bar = _figure(axes).colorbar(mesh, ax=axes, location="top", label=label, aspect=30, pad=0.04)
        bar.outline.set_visible(False)

    return _svg(name, draw, height=1.5 + 0.24 * len(modules))


def spectra(name: str, values: Mapping[str, Sequence[float]], palette: Mapping[str, str]) -> str:
    """Singular values of each adapter in one layer."""

    def draw(axes: Axes) -> None:
        for label, row in values.items():
            axes.plot(range(1, 1 + len(row)), row, marker=".", color=palette.get(label, _GREY), label=label)
        axes.set(xlabel="index", ylabel="singular value of the update", ylim=(0, None))
        axes.locator_params(axis="x", integer=True)
        _legend(axes)

    return _svg(name, draw)


def distributions(name: str, counted: Mapping[str, Any], palette: Mapping[str, str]) -> str:
    """Distribution of the entries of each adapter's update."""

    def draw(axes: Axes) -> None:
        for label, density in counted["density"].items():
            colour = palette.get(label, _GREY)
            axes.stairs(density, counted["edges"], color=colour, label=label, linewidth=2.0 if label == FUSED else 1.2)
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
            found = row["against_mean_seed"]
            value = 100 * found["value"]
            spread = [[value - 100 * found["low"]], [100 * found["high"] - value]]
            axes.errorbar([value], [i], xerr=spread, fmt="D", color=INK, markersize=5, capsize=3)
        axes.axvline(0, color=INK, linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(rows)), [row["run"] for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("fused minus mean seed (points)")

    return _svg(name, draw, height=0.9 + 0.28 * len(rows))


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        _figure(axes).legend(
            handles, labels, loc="outside upper center", ncols=min(len(labels), 5), handlelength=1.2, columnspacing=1.0
        )


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
