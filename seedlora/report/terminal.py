"""Write the report of a run, and say in the terminal what it found out beside the test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.table import Table
from rich.text import Text

from seedlora.records.sweep import SweepRecord
from seedlora.report.page import write_report
from seedlora.report.sweep import sweep_table
from seedlora.scores.tables import titled_table


def told_report(run: Path, on_fault: Callable[[str], None]) -> list[Table | Text | str]:
    """Write the report of a run that is whole, and return what is printed of it.

    Args:
        run: its folder.
        on_fault: is told why there is no report: a fault in it must not cost the run, and is no error of it.
    """
    try:
        found = write_report(run)
    except Exception as error:
        on_fault(f"no report: {type(error).__name__}: {error}; the run is whole; try: python -m seedlora report {run}")
        return []
    told: list[Table | Text | str] = [] if found["sweep"] is None else [*_told_sweep(found["sweep"])]
    if found["train_or_fuse"] is not None:
        told += found["train_or_fuse"]["sentences"]
    # Unbroken, so that it can be copied.
    return [*told, Text(f"report: {run / 'report.html'}", no_wrap=True, overflow="ignore")]


def _told_sweep(sweep: SweepRecord) -> list[Table | str]:
    """Return the validation losses over the swept options as a table for the terminal, with what they say."""
    shown, table = sweep_table(sweep), titled_table("Validation loss of the sweep, nats per token")
    for header in shown.header:
        table.add_column(header, justify="left" if header == shown.header[0] else "right")
    for row in shown.rows:
        table.add_row(*row)
    return [table, *sweep["sentences"]]
