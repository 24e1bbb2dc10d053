"""Build a page of sections with lines, tables and pictures, and write the numbers in its cells."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from markupsafe import Markup

from seedlora.records.report import PairedDifference
from seedlora.records.results import LossRecord
from seedlora.report.svg import named
from seedlora.scores.wording import LOSS, PERCENT, POINTS

Row = TypeVar("Row")


@dataclass(frozen=True)
class Table:
    """Hold cells as they are shown.

    Args:
        header: names of the columns; the first column names the row.
        rows: the cells.
        words: whether the other columns hold text, not numbers.
        caption: what the table shows.
        sortable: whether a click on a column's name sorts the rows by it.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: bool = False
    caption: str = ""
    sortable: bool = False

    @property
    def adapters(self) -> bool:
        """Return whether the rows are adapters, which have colours."""
        return self.header[0] in ("adapter", "control", "cosine")


@dataclass(frozen=True)
class Picture:
    """Show a figure, with what it shows and, for whoever asks, how to read it."""

    svg: Markup
    caption: str
    note: str = ""


@dataclass(frozen=True)
class Answer:
    """Show what some adapters say, all the same, to one test item."""

    adapters: Sequence[str]
    text: str
    right: bool


@dataclass(frozen=True)
class Example:
    """Show one test item with its expected answer, and who says what."""

    item: str
    prompt: str
    expected: str
    answers: Sequence[Answer]


@dataclass(frozen=True)
class Section:
    """Hold a part of the page; empty parts are left out.

    Args:
        title: of the part.
        lines: what it says.
        tables: what it shows in cells.
        pictures: what it draws.
        items: sentences that stand below each other.
        code: a command that can be copied.
        notes: how to read it, for whoever asks.
        gist: what it comes to, beside its title.
        unfolded: whether it is open from the start.
        examples: test items with the answers to them.
    """

    title: str
    lines: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    items: Sequence[str] = ()
    code: str | None = None
    notes: Sequence[str] = ()
    gist: str = ""
    unfolded: bool = False
    examples: Sequence[Example] = ()

    @property
    def is_empty(self) -> bool:
        """Return whether nothing is in it."""
        return not (self.lines or self.tables or self.pictures or self.items or self.code or self.examples)

    @property
    def anchor(self) -> str:
        """Return the id that links to it."""
        return "section-" + re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


class Drawings:
    """Give out the figures that were drawn.

    Args:
        drawn: SVG by name, drawn by us, with its text escaped.
    """

    def __init__(self, drawn: Mapping[str, str]) -> None:
        self._drawn = drawn

    def picture(self, name: str, caption: str, note: str = "") -> list[Picture]:
        """Return the figure of a name with its caption, if it was drawn."""
        if name not in self._drawn:
            return []
        return [Picture(Markup(named(self._drawn[name], caption)), caption, note)]  # noqa: S704 - drawn by us


def make_table(
    columns: Mapping[str, Callable[[Row], str]],
    rows: Iterable[Row],
    *,
    words: bool = False,
    caption: str = "",
    sortable: bool = False,
) -> Table:
    """Make a table.

    Args:
        columns: by name how the cell of a row is written.
        rows: what is shown, one row each.
        words: whether its columns hold text.
        caption: what it shows.
        sortable: whether its rows can be sorted.
    """
    cells = [[write(row) for write in columns.values()] for row in rows]
    return Table(list(columns), cells, words=words, caption=caption, sortable=sortable)


def percent_text(value: float | None) -> str:
    """Write a share in percent; nothing for ``None``."""
    return "" if value is None else PERCENT(value)


def number_text(value: float | None) -> str:
    """Write a number with three digits; nothing for ``None``."""
    return "" if value is None else f"{value:.3g}"


def count_text(value: int | None) -> str:
    """Write a whole number; nothing for ``None``."""
    return "" if value is None else f"{value:,}"


def amount_text(value: float | None) -> str:
    """Write an amount of something, whole or not, and say so where it is not known."""
    if value is None:
        return "not known"
    if isinstance(value, int):
        return count_text(value)
    return f"{value:,.0f}" if value >= 100 else number_text(value)


def loss_text(row: LossRecord | None) -> str:
    """Write a loss with its interval; nothing for ``None``."""
    return "" if row is None else LOSS.with_interval(row["value"], row["low"], row["high"])


def points_text(row: PairedDifference | None) -> str:
    """Write a difference in points with its interval; nothing for ``None``."""
    return "" if row is None else POINTS.with_interval(row["value"], row["low"], row["high"])


def duration_text(seconds: float) -> str:
    """Write how long something took.

    >>> duration_text(3.2), duration_text(276), duration_text(7530)
    ('3 s', '4 min 36 s', '2 h 5 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"
