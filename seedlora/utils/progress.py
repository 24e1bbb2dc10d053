"""Consoles and progress bars, for texts of whatever characters."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text


def plain_console(*, stderr: bool = False, soft_wrap: bool = False, quiet: bool = False) -> Console:
    """Return a console that prints texts as they are: brackets in a path are no markup, ``:x:`` is no picture."""
    return Console(stderr=stderr, soft_wrap=soft_wrap, quiet=quiet, markup=False, emoji=False)


def progress_bar(
    *columns: ProgressColumn,
    console: Console | None = None,
    hidden: bool = False,
    speed_estimate_period: float = 30.0,
) -> Progress:
    """Return a bar that vanishes when it is done, and is not shown where no terminal is.

    Args:
        columns: what stands behind the task's description and the bar.
        console: where it is shown. Default: stderr.
        hidden: whether it is not shown at all, as by the processes beside the first one.
        speed_estimate_period: seconds over which the speed is measured for the time that is left.
    """
    console = console or plain_console(stderr=True)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *columns,
        console=console,
        transient=True,
        disable=hidden or not console.is_terminal,
        speed_estimate_period=speed_estimate_period,
    )


def show(console: Console, told: Iterable[Table | Text | str]) -> None:
    """Print tables and sentences one after the other; brackets in a sentence are no markup."""
    for each in told:
        console.print(each, highlight=False, markup=False, crop=False)
