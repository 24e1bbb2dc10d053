"""Show tables, bars and JSON in the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

from rich.progress import MofNCompleteColumn, Progress, TaskID, TimeElapsedColumn
from rich.table import Table

from seedlora.adapters.servers import NOT_KNOWN, vllm_rank
from seedlora.utils.progress import progress_bar


def describe_serving(served: Mapping[str, Sequence[str]], rank: int) -> str:
    """Say which servers load an adapter, and why others do not."""
    good = [server for server, reasons in served.items() if not reasons]
    limit = f" (vLLM: --max-lora-rank {vllm_rank(rank)})" if "vLLM" in good else ""
    parts = [f"served by {', '.join(good)}{limit}"] if good else []
    bad: dict[str, list[str]] = {}
    for server, reasons in served.items():
        if reasons:
            bad.setdefault("; ".join(reasons), []).append(server)
    for reason, servers in bad.items():
        how = "not known for" if reason.startswith(NOT_KNOWN) else "not by"
        parts.append(f"{how} {', '.join(servers)} ({reason.removeprefix(NOT_KNOWN)})")
    return "; ".join(parts)


def is_unknown(reasons: Sequence[str]) -> bool:
    """Return whether the reasons say that nothing is known of a server."""
    return any(reason.startswith(NOT_KNOWN) for reason in reasons)


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
