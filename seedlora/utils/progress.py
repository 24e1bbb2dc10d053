"""Progress bars."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn


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
    console = console or Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *columns,
        console=console,
        transient=True,
        disable=hidden or not console.is_terminal,
        speed_estimate_period=speed_estimate_period,
    )
