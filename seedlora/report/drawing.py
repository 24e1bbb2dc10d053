"""Draw with matplotlib into SVG that fits a page, each adapter alike in every figure.

Text and lines take the colour of the page around them, so that one drawing serves a light and a dark page. The same
data gives the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from seedlora.merge.method_table import METHOD_TABLE
from seedlora.names import (
    BASE,
    EMA_SOUP,
    FUSED,
    LONG_SEED,
    LONG_SEED_BEST,
    LONG_SEED_EMA,
    MEANING,
    OUTER_SEED,
    SOUP,
    WIDE_BATCH,
    WIDE_BATCHES,
    WIDE_SEED,
    ema_name,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

#: Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6D31")
#: Stand-ins, replaced by the page's own colours.
INK, GRID = "#010203", "#040506"
GREY, PALE = "#8a8a8a", "#b9b9b9"


class ControlStyle(NamedTuple):
    """Hold how a control that is trained is drawn, in matplotlib's words."""

    colour: str
    line: str
    marker: str


#: The controls that are trained, with what is kept or chosen of their trainings.
CONTROL_STYLES = {
    LONG_SEED: ControlStyle("#C0408A", "--", "s"),
    LONG_SEED_BEST: ControlStyle("#C0408A", "-.", "*"),
    LONG_SEED_EMA: ControlStyle("#C0408A", ":", "P"),
    WIDE_SEED: ControlStyle("#999933", ":", "^"),
    OUTER_SEED: ControlStyle("#B0703C", "--", "X"),
    WIDE_BATCH: ControlStyle("#6A7FA8", "-", "^"),
    **{
        name: ControlStyle("#6A7FA8", line, marker)
        for name, line, marker in zip(WIDE_BATCHES, (":", "--", "-."), "v<>", strict=True)
    },
}
#: The other controls and the methods have pairs of a colour and a marker, the same in every report.
_OTHERS = (
    *dict.fromkeys(label for label in (*MEANING, *METHOD_TABLE) if label not in (*CONTROL_STYLES, EMA_SOUP)),
    EMA_SOUP,
)
OTHER_COLOURS = ("#CC6677", "#2F9E8F", "#8A7BD8", "#8C8C2E", "#B0703C", "#4F93C9")
_OTHER_MARKERS = ("<", ">", "*", "d", "p")
MARKERS = {
    **{label: _OTHER_MARKERS[i % len(_OTHER_MARKERS)] for i, label in enumerate(_OTHERS)},
    **{label: style.marker for label, style in CONTROL_STYLES.items()},
    **{FUSED: "D", SOUP: "D"},
}
#: Lines and markers of seeds: from the eighth on the colours come again, with the next of each.
SEED_LINES, SEED_MARKERS = ("-", "--", ":", "-."), ("o", "v", "P", "X")
#: Line and marker of a seed's exponential mean.
MEAN_LINE, MEAN_MARKER = "--", "s"
#: Inches; small enough that the text can still be read on a phone.
WIDTH, HEIGHT = 4.6, 3.0
#: Inches that a letter of a legend takes, and what stands before and after a label.
_CHARACTER, _HANDLE = 0.068, 0.36
#: Letters of a name down the side.
_LONGEST = 28
#: Settings of matplotlib, which has a literal type of all their names.
_STYLE: dict[Any, object] = {
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


@dataclass(frozen=True)
class Interval:
    """Hold a number with its interval, as it is drawn.

    Args:
        value: the number.
        low: lower end of its interval.
        high: upper end of it.
    """

    value: float
    low: float
    high: float

    @property
    def below(self) -> float:
        """Return how far the interval reaches below the number."""
        return self.value - self.low

    @property
    def above(self) -> float:
        """Return how far the interval reaches above the number."""
        return self.high - self.value


@dataclass(frozen=True)
class Palette:
    """Decide how each adapter is drawn: the same in every figure.

    Args:
        seeds: labels of the seeds, in their order.
    """

    seeds: Sequence[str]

    @cached_property
    def colours(self) -> dict[str, str]:
        """Return colours by label: Okabe and Ito's for seeds, greys for soup and base, the ink for the fused one."""
        return {
            **{seed: COLOURS[i % len(COLOURS)] for i, seed in enumerate(self.seeds)},
            # An exponential mean has its seed's colour, and a marker and a line of its own.
            **{ema_name(seed): COLOURS[i % len(COLOURS)] for i, seed in enumerate(self.seeds)},
            **{label: OTHER_COLOURS[i % len(OTHER_COLOURS)] for i, label in enumerate(_OTHERS)},
            **{label: style.colour for label, style in CONTROL_STYLES.items()},
            SOUP: GREY,
            BASE: PALE,
            FUSED: INK,
        }

    def colour(self, label: str) -> str:
        """Return the colour of an adapter; grey for one that is not known."""
        return self.colours.get(label, GREY)

    def line(self, label: str) -> str:
        """Return the style of an adapter's lines."""
        if label in map(ema_name, self.seeds):
            return MEAN_LINE
        if label in CONTROL_STYLES:
            return CONTROL_STYLES[label].line
        return SEED_LINES[self._round(label) % len(SEED_LINES)]

    def marker(self, label: str) -> str:
        """Return the marker of an adapter."""
        if label in map(ema_name, self.seeds):
            return MEAN_MARKER
        return MARKERS.get(label) or SEED_MARKERS[self._round(label) % len(SEED_MARKERS)]

    def _round(self, label: str) -> int:
        """Return how often the colours were used up before this seed; 0 for what is no seed."""
        return list(self.seeds).index(label) // len(COLOURS) if label in self.seeds else 0


def draw_svg(name: str, draw: Callable[[Axes], None], *, height: float = HEIGHT) -> str:
    """Draw, and make the SVG fit to stand in a page among others: its ids are its own, its colours the page's.

    Args:
        name: that its ids begin with.
        draw: draws on the axes.
        height: inches.
    """
    from matplotlib.figure import Figure

    with own_style():
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


def standalone(svg: str) -> str:
    """Make a figure a file of its own: black on white, in no page's colours."""
    return (
        svg.replace("currentColor", "#000000")
        .replace("var(--line)", "#d9dce0")
        .replace("<svg", '<svg style="background: white"', 1)
    )


@contextmanager
def own_style() -> Iterator[None]:
    """Set matplotlib's own defaults and ours, whatever the user's are."""
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def draw_interval(axes: Axes, place: int, drawn: Interval, colour: str, marker: str = MARKERS[FUSED]) -> None:
    """Draw a number with its interval, across, at a place down the side."""
    spread = [[drawn.below], [drawn.above]]
    axes.errorbar([drawn.value], [place], xerr=spread, fmt=marker, color=colour, markersize=5, capsize=3)


def shorten(name: str) -> str:
    """Leave the middle out of a long name, so that it leaves room for what is drawn."""
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST // 2]}…{name[-_LONGEST // 2 + 1 :]}"


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Write names down the side, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")


def draw_legend(axes: Axes) -> None:
    """Draw the legend above the axes, in as many columns as fit.

    They are filled one after the other, each as wide as its longest label.
    """
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


def draw_scale(axes: Axes, mesh: QuadMesh, label: str) -> Axes:
    """Draw what the colours of a heat map mean, over it."""
    bar = _figure(axes).colorbar(mesh, ax=axes, location="top", label=label, aspect=30, pad=0.04)
    bar.outline.set_visible(False)
    bar.ax.locator_params(axis="x", nbins=6)
    return bar.ax


def text_colour(value: float, low: float, high: float) -> str:
    """Return the colour of a number in a cell of a heat map: black or white, whichever stands out more."""
    return "white" if value < low + 0.47 * (high - low) else "black"


def _figure(axes: Axes) -> Figure:
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure
