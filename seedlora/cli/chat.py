"""The command ``chat``: talk to an adapter, or to several side by side."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from seedlora.cli.command_parser import CommandParser, run_command
from seedlora.cli.speakers import Speakers, add_options, opening, set_up_speakers
from seedlora.datamodules.conversations import Turn

HELP = (
    "/new begins a new conversation, /system TEXT one with a system turn, /quit or Ctrl-D ends; Ctrl-C stops an answer"
)
#: Answers stand side by side where each has so many columns, below each other otherwise.
COLUMNS = 36


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    return run_command(make_parser(), argv, lambda arguments: talk(arguments, Console()))


def make_parser() -> CommandParser:
    """Make the parser of the command."""
    parser = CommandParser("chat", f"Talk to an adapter, or to several side by side. {HELP}.")
    add_options(parser)
    return parser


def talk(arguments: Mapping[str, Any], console: Console) -> None:
    """Read requests and show the answers, until there are no more.

    Args:
        arguments: of the command.
        console: where answers are shown.

    Raises:
        ValueError: for a request that cannot be carried out.
    """
    with suppress(ImportError):
        import readline  # noqa: F401 - lines can be edited, and those before come back
    speakers = set_up_speakers(arguments, console)
    names = ", ".join(speakers.records)
    for note in (*speakers.notes, f"{names}: {HELP}"):
        console.print(note, style="dim", highlight=False, markup=False)
    system = arguments["system"]
    talks = {name: opening(system) for name in speakers.records}
    while (request := _read(console)) is not None:
        word, _, rest = request.partition(" ")
        if word == "/quit":
            break
        if word in ("/new", "/system"):
            system = rest.strip() or None if word == "/system" else system
            talks = {name: opening(system) for name in speakers.records}
        elif word.startswith("/"):
            console.print(f"there is no {word}; {HELP}", style="red", highlight=False, markup=False)
        elif request.strip():
            talks = _answer(speakers, talks, request, console)


def _read(console: Console) -> str | None:
    """Return the next line; None at the end of the input."""
    try:
        return input("\n> " if sys.stdin.isatty() else "")
    except EOFError:
        console.print()
        return None
    except KeyboardInterrupt:  # a line that was thought better of
        return ""


def _answer(
    speakers: Speakers, talks: Mapping[str, Sequence[Turn]], request: str, console: Console
) -> dict[str, list[Turn]]:
    """Show the answers of all, and return the conversations with them.

    A request that cannot be answered is said, and leaves the conversations as they were. An answer that is stopped
    counts as far as it was said.
    """
    asked = {name: [*turns, Turn("user", request)] for name, turns in talks.items()}
    said = dict.fromkeys(asked, "")
    with Live(_show(said, console), console=console, refresh_per_second=12, vertical_overflow="visible") as live:

        def show(name: str, _: int, text: str) -> None:
            said[name] = text
            live.update(_show(said, console))

        try:
            found = speakers.answer({name: [turns] for name, turns in asked.items()}, show)
            said |= {name: answers[0].text for name, answers in found.items()}
        except KeyboardInterrupt:
            said = {name: f"{text} ..." for name, text in said.items()}
        except ValueError as error:
            live.update(Text(str(error), style="red"))
            return {name: list(turns) for name, turns in talks.items()}
        live.update(_show(said, console))
    if not console.is_terminal:  # Live ends the line on a terminal alone
        console.print()
    return {name: [*turns, Turn("assistant", said[name].removesuffix(" ..."))] for name, turns in asked.items()}


def _show(said: Mapping[str, str], console: Console) -> RenderableType:
    """Return the answers so far: one as it is, several under their names."""
    if len(said) == 1:
        return Text(next(iter(said.values())))
    panels = [Panel(Text(text), title=name, title_align="left") for name, text in said.items()]
    if console.width // len(panels) < COLUMNS:
        return Group(*panels)
    table = Table.grid(expand=True)
    for _ in panels:
        table.add_column(ratio=1)
    table.add_row(*panels)
    return table
