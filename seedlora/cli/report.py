"""The command ``report``: write the report of runs, and the comparison of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from seedlora.cli.command_parser import CommandParser, run_command
from seedlora.cli.terminal import counting_bar, layer_counter, number_table, print_json
from seedlora.records.settings import SETTINGS
from seedlora.report.comparison_sections import runs_table
from seedlora.report.page import HTML_NAME, write_comparison, write_report
from seedlora.report.watching import watch
from seedlora.report.weights import LAYERS, LAYERS_HELP
from seedlora.utils.progress import plain_console


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    return run_command(make_parser(), argv, report)


def make_parser() -> CommandParser:
    """Make the parser of the command."""
    parser = CommandParser("report", "Build the report of runs again, and compare several.")
    add = parser.add_argument
    add("runs", nargs="+", help="folders of runs of train.py")
    add("--layers", default=LAYERS, help=LAYERS_HELP)
    add("--out", default="comparison", help="folder of the comparison of several runs")
    add("--watch", action="store_true", help="rebuild the report of a run while it trains; ends with it, or by Ctrl-C")
    add("--json", action="store_true", help="print what is in report.json")
    return parser


def report(arguments: Mapping[str, Any]) -> None:
    """Write the report of a run, or the comparison of several."""
    runs = [Path(run) for run in arguments["runs"]]
    if missing := [run for run in runs if not (run / SETTINGS.name).is_file()]:
        raise ValueError(f"{missing[0]} holds no run: it has no {SETTINGS.name}")
    if repeated := [run for i, run in enumerate(runs) if run.resolve() in [other.resolve() for other in runs[:i]]]:
        raise ValueError(f"{repeated[0]} is given twice")
    console = plain_console()
    if arguments["watch"]:
        _watch(runs, arguments, console)
        return
    found = []
    with counting_bar() as progress:
        for run in runs:
            task = progress.add_task(run.name, total=None)
            found.append(write_report(run, layers=arguments["layers"], on_layer=layer_counter(progress, task)))
    several = write_comparison(found, runs, arguments["out"]) if len(runs) > 1 else None
    if arguments["json"]:
        print_json(several or found[0])
        return
    for run, facts in zip(runs, found, strict=True):
        console.print(f"{run}: {facts['verdict']}", highlight=False, markup=False, soft_wrap=True)
        for sentence in (*facts["advice"]["sentences"], *facts["left_out"], *facts["missing"]):
            console.print(f"  {sentence}", highlight=False, markup=False, soft_wrap=True)
    if several is not None:
        # The page has all columns; these fit into a terminal.
        rows, shown = runs_table(several), ("run", "method", "mean seed", "fused", "against mean seed")
        table = number_table(*shown)
        for row in rows.rows:
            table.add_row(*(row[rows.header.index(name)] for name in shown))
        console.print(table)
        console.print(several["verdict"], highlight=False, markup=False, soft_wrap=True)
    for folder in [*runs, *([] if several is None else [Path(arguments["out"])])]:
        console.print(f"report: {folder / 'report.html'}", highlight=False, soft_wrap=True)


def _watch(runs: Sequence[Path], arguments: Mapping[str, Any], console: Console) -> None:
    """Keep the report of one run up to date until it ends."""
    if len(runs) > 1:
        raise ValueError(f"--watch takes one run, got {len(runs)}")
    if arguments["json"]:
        raise ValueError("--watch prints no JSON; give --json without it once the run has ended")

    def say(sentence: str) -> None:
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)

    (run,) = runs
    page = run / HTML_NAME
    say(f"watching {run}: {page} loads itself again; this ends with the run, or by Ctrl-C")
    try:
        watch(run, layers=arguments["layers"], say=say)
    except KeyboardInterrupt:
        say(f"no longer watching; {page} is as the run was last")
    else:
        say(f"nobody is at work in {run}; report: {page}")
