"""Keep the report of a run up to date while it trains."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from seedlora.records.results import RESULTS
from seedlora.records.selection import SELECTION
from seedlora.records.training import TRAINED
from seedlora.report.page import stop_reloading, write_report
from seedlora.report.weights import LAYERS
from seedlora.run.ownership import is_at_work

#: Seconds between two looks at a run.
PAUSE = 1.0


def watch(
    run: Path,
    *,
    layers: str = LAYERS,
    say: Callable[[str], object] = lambda _sentence: None,
    wait: Callable[[float], object] = time.sleep,
) -> None:
    """Write the report of a run anew whenever it has logged something, until no process is at work in its folder.

    Each file is whole at any time. Until the end the page loads itself again every few seconds; nothing is served.

    Args:
        run: its folder.
        layers: as in :func:`seedlora.report.page.write_report`.
        say: told what cannot be read for the moment.
        wait: between two looks, for so many seconds.

    Raises:
        ValueError: as :func:`seedlora.report.page.write_report`, once the run has ended.
    """
    seen: object = None
    try:
        # The order matters: what a run writes last is there before it gives its folder up.
        while is_at_work(run):
            if (now := _state(run)) != seen:
                seen = now
                try:
                    write_report(run, layers=layers, reload=True)
                except ValueError as error:  # it may be between two files
                    say(f"not written this time: {error}")
            wait(PAUSE)
        write_report(run, layers=layers)
    except KeyboardInterrupt:
        stop_reloading(run)
        raise


def _state(run: Path) -> list[tuple[str, int, int]]:
    """Return what tells whether a run has written something: its files with their times and sizes."""
    files = [*run.glob("metrics*.jsonl"), *(run / name for name in (TRAINED.name, SELECTION.name, RESULTS.name))]
    stats = [(file.name, file.stat()) for file in sorted(files) if file.is_file()]
    return [(name, stat.st_mtime_ns, stat.st_size) for name, stat in stats]
