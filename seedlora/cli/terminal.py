"""Show tables, bars and JSON in the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable

from rich.progress import MofNCompleteColumn, Progress, TaskID, TimeElapsedColumn
from rich.table import Table

from seedlora.utils.progress import progress_bar


def counting_bar() -> Progress:
    """Return a bar that counts what is done."""
    return progress_bar(MofNCompleteColumn(), TimeElapsedColumn())


def layer_counter(progress: Progress, task: TaskID) -> Callable[[str], None]:
    """Return what moves a bar on by one for each layer that it is called with."""

    def count(_path: str) -> None:
        progress.advance(task)

    return count


def number_table(*columns: str) -> Table:
    """Make a table of names and numbers, in which only a long name, a path, is folded."""
    table = Table()
    for i, column in enumerate(columns):
        table.add_column(column, overflow="fold", justify="left" if i == 0 else "right", no_wrap=i > 0)
    table.columns[0].min_width = 9
    return table


def format_numbers(*values: float) -> list[str]:
    """Format numbers for a table."""
    return [f"{value:.3g}" for value in values]


def print_json(value: object) -> None:
    """Print a value as JSON."""
    print(json.dumps(value, indent=2, default=str))  # noqa: T201 - what --json asks for
