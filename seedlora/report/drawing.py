"""Draw with matplotlib into SVG that fits a page, each adapter alike in every figure.

Text and lines take the colour of the page around them, so that one drawing serves a light and a dark page. The same
data gives the same bytes.
"""

from __future__ import annotations

import io
import json
import math
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
from seedlora.report.svg import GRID, HOVER, INK, fit_into_page

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.container import ErrorbarContainer
    from matplotlib.figure import Figure

#: Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6D31")
_MORE = (
    "8778F0 007800 785A87 969600 B43C3C 1E7869 1E96B4 964BB4 F06969 B46969 7878B4 2D96F0 5A5AC3 C3875A 4B960F B469D2 "
    "69875A 7896C3 3C78E1 697800 875A5A 4B6987 D24B5A A569A5 A587D2 B47800 1E874B 4B8787 969669 E15A87 A54B00 A54B69 "
    "E17800 B48787 7869D2 5AA55A 69693C 4B87C3 D269C3 C34B1E 6987E1 A53C96 D2695A B4693C C35AA5 966978 A55A4B 1EA5A5"
)
#: Further ones for whatever else is drawn: each as far as it can be from those before it (in OKLab), with a contrast of
#: 3 to 1 on a white page and on a dark one.
MORE_COLOURS = tuple(f"#{digits}" for digits in _MORE.split())
GREY, PALE = "#8a8a8a", "#b9b9b9"


class ControlStyle(NamedTuple):
    """Hold how a control that is trained is drawn beside its colour, in matplotlib's words."""

    line: str
    marker: str


#: The controls that are trained, with what is kept or chosen of their trainings.
CONTROL_STYLES = {
    LONG_SEED: ControlStyle("--", "s"),
    LONG_SEED_BEST: ControlStyle("-.", "*"),
    LONG_SEED_EMA: ControlStyle(":", "P"),
    WIDE_SEED: ControlStyle(":", "^"),
    OUTER_SEED: ControlStyle("--", "X"),
    WIDE_BATCH: ControlStyle("-", "^"),
    **{
        name: ControlStyle(line, marker)
        for name, line, marker in zip(WIDE_BATCHES, (":", "--", "-."), "v<>", strict=True)
    },
}
#: The other controls and the methods have a marker, the same in every report.
_OTHERS = (
    *dict.fromkeys(label for label in (*MEANING, *METHOD_TABLE) if label not in (*CONTROL_STYLES, EMA_SOUP)),
    EMA_SOUP,
)
#: A colour of its own for each of all these, the same in every report; the rest is for seeds from the eighth on.
_OWN_COLOURS = dict(zip((*CONTROL_STYLES, *_OTHERS), MORE_COLOURS, strict=False))
_SEED_COLOURS = (*COLOURS, *MORE_COLOURS[len(_OWN_COLOURS) :])
_OTHER_MARKERS = ("<", ">", "*", "d", "p")
MARKERS = {
    **{label: _OTHER_MARKERS[i % len(_OTHER_MARKERS)] for i, label in enumerate(_OTHERS)},
    **{label: style.marker for label, style in CONTROL_STYLES.items()},
    **{FUSED: "D", SOUP: "D"},
}
#: Lines and markers of seeds: each seven have the next of each.
SEED_LINES, SEED_MARKERS = ("-", "--", ":", "-."), ("o", "v", "P", "X")
#: Line and marker of a seed's exponential mean.
MEAN_LINE, MEAN_MARKER = "--", "s"
#: Inches; small enough that the text can still be read on a phone.
WIDTH, HEIGHT = 4.6, 3.0
#: Inches that a letter of a legend takes, and what stands before and after a label.
_CHARACTER, _HANDLE = 0.068, 0.36
#: Letters of a name down the side.
_LONGEST = 28
#: Points of a curve that show their value under the pointer.
HOVERED = 24
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

    def text(self, form: str) -> str:
        """Write the number with its interval, as :func:`format` takes the form."""
        return f"{self.value:{form}} ({self.low:{form}} to {self.high:{form}})"


@dataclass(frozen=True)
class Palette:
    """Decide how each adapter is drawn: the same in every figure.

    Args:
        seeds: labels of the seeds, in their order.
    """

    seeds: Sequence[str]

    @cached_property
    def colours(self) -> dict[str, str]:
        """Return colours by label, no two alike: greys for soup and base, the ink for the fused adapter."""
        seeds = {seed: _SEED_COLOURS[i % len(_SEED_COLOURS)] for i, seed in enumerate(self.seeds)}
        return {
            **seeds,
            **{ema_name(seed): _faded(colour) for seed, colour in seeds.items()},
            **_OWN_COLOURS,
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


def _faded(colour: str) -> str:
    """Return a colour half way to grey: that of an exponential mean beside its seed."""
    return "#" + "".join(f"{(int(colour[i : i + 2], 16) + 0x80) // 2:02X}" for i in (1, 3, 5))


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
    return fit_into_page(buffer.getvalue(), name)


@contextmanager
def own_style() -> Iterator[None]:
    """Set matplotlib's own defaults and ours, whatever the user's are."""
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def hover(artist: Artist, *texts: str) -> None:
    """Have a drawn thing show a text under the pointer: one for all of it, or one for each of its marks."""
    artist.set_gid(HOVER + json.dumps(texts))


def hover_points(axes: Axes, curve: Sequence[tuple[float, float]], texts: Sequence[str]) -> None:
    """Have points of a curve show a text each under the pointer, at most :data:`HOVERED` of them, the last included."""
    step = -(-len(curve) // HOVERED)
    chosen = range((len(curve) - 1) % step, len(curve), step)
    x, y = zip(*(curve[i] for i in chosen), strict=True)
    (points,) = axes.plot(x, y, linestyle="none", marker="o", markersize=8, alpha=0, label="_points")
    hover(points, *(texts[i] for i in chosen))


def draw_interval(
    axes: Axes, place: int, drawn: Interval, colour: str, text: str, marker: str = MARKERS[FUSED]
) -> None:
    """Draw a number with its interval, across, at a place down the side; the pointer shows its text."""
    spread = [[drawn.below], [drawn.above]]
    container = axes.errorbar([drawn.value], [place], xerr=spread, fmt=marker, color=colour, markersize=5, capsize=3)
    hover_bars(container, text)


def hover_bars(container: ErrorbarContainer, text: str) -> None:
    """Have a mark with its bars show a text under the pointer."""
    mark, _, bars = container.lines
    for artist in (mark, *bars):
        if artist is not None:
            hover(artist, text)


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


def colour_range(values: Sequence[float], least: float) -> tuple[float, float]:
    """Return the ends of a heat map's colours: those of the values, but at least so far apart.

    Numbers that are nearly the same look so then.

    >>> colour_range([0.190, 0.193], 0.2)
    (0.0915, 0.2915)
    """
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite), max(finite)
    missing = max(0.0, least - (high - low)) / 2
    return low - missing, high + missing


def text_colour(value: float, low: float, high: float) -> str:
    """Return the colour of a number in a cell of a heat map: black or white, whichever stands out more."""
    return "white" if value < low + 0.47 * (high - low) else "black"


def _figure(axes: Axes) -> Figure:
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure
