"""Build a page of sections with lines, tables and pictures, and write the numbers in its cells."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from markupsafe import Markup

from seedlora.records.report import PairedDifference
from seedlora.records.results import LossRecord
from seedlora.scores.wording import LOSS, PERCENT, POINTS

Row = TypeVar("Row")


@dataclass(frozen=True)
class Table:
    """Hold cells as they are shown.

    Args:
        header: names of the columns; the first column names the row.
        rows: the cells.
        words: whether the other columns hold text, not numbers.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: bool = False


@dataclass(frozen=True)
class Picture:
    """Show a figure, with what to look at."""

    svg: Markup
    caption: str


@dataclass(frozen=True)
class Section:
    """Hold a part of the page; empty parts are left out."""

    title: str
    lines: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    items: Sequence[str] = ()
    code: str | None = None

    @property
    def is_empty(self) -> bool:
        """Return whether nothing is in it."""
        return not (self.lines or self.tables or self.pictures or self.items or self.code)


class Drawings:
    """Give out the figures that were drawn.

    Args:
        drawn: SVG by name, drawn by us, with its text escaped.
    """

    def __init__(self, drawn: Mapping[str, str]) -> None:
        self._drawn = {name: Markup(svg) for name, svg in drawn.items()}  # noqa: S704 - drawn by us

    def picture(self, name: str, caption: str) -> list[Picture]:
        """Return the figure of a name with its caption, if it was drawn."""
        return [Picture(self._drawn[name], caption)] if name in self._drawn else []


def make_table(columns: Mapping[str, Callable[[Row], str]], rows: Iterable[Row], *, words: bool = False) -> Table:
    """Make a table.

    Args:
        columns: by name how the cell of a row is written.
        rows: what is shown, one row each.
        words: whether its columns hold text.
    """
    return Table(list(columns), [[write(row) for write in columns.values()] for row in rows], words=words)


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
