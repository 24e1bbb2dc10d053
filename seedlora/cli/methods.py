"""The command ``methods``: show the table of merge methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from seedlora.cli.command_parser import CommandParser, run_command
from seedlora.cli.terminal import print_json
from seedlora.merge.common_options import COMMON_DEFAULTS
from seedlora.merge.method_table import METHOD_TABLE, PYTHON_ONLY, REQUIRED
from seedlora.names import GREEDY
from seedlora.utils.progress import plain_console


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    return run_command(make_parser(), argv, show_methods)


def make_parser() -> CommandParser:
    """Make the parser of the command."""
    parser = CommandParser("methods", "Show the table of merge methods.")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    return parser


def show_methods(arguments: Mapping[str, Any]) -> None:
    """Show the table of merge methods."""
    if arguments["json"]:
        rows = {
            name: {
                "formula": method.formula,
                "source": method.source,
                "options": {key: _display_default(value) for key, value in method.options.items()},
            }
            for name, method in METHOD_TABLE.items()
        }
        print_json({"methods": rows, "common options": dict(COMMON_DEFAULTS)})
        return
    console = plain_console()
    table = Table("method", "formula", "options and defaults", "source")
    for name, method in METHOD_TABLE.items():
        defaults = {key: value for key, value in method.options.items() if key not in PYTHON_ONLY}
        options = [f"{key}={_display_default(value)}" for key, value in defaults.items()]
        if name == GREEDY:
            options.append("by --merge of train.py alone")
        table.add_row(name, method.formula, "\n".join(options), method.source)
    console.print(table)
    console.print("all: " + ", ".join(f"{key}={value}" for key, value in COMMON_DEFAULTS.items()))


def _display_default(value: object) -> object:
    return "required" if value is REQUIRED else value
