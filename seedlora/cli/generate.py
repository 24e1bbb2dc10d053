"""The command ``generate``: answer prompts by an adapter, or by several side by side."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from seedlora.cli.command_parser import CommandParser, run_command
from seedlora.cli.speakers import Speakers, add_options, opening, set_up_speakers
from seedlora.cli.terminal import counting_bar, print_json
from seedlora.datamodules.conversations import Turn
from seedlora.datamodules.row_files import Row, is_row_file, read_rows
from seedlora.datamodules.row_forms import request_of
from seedlora.utils.places import expanded

#: Shown in the place of an answer that has none, so that it is not taken for a fault of the command.
NO_TEXT = "(no text: the model ended its answer at once)"


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    return run_command(make_parser(), argv, answer_prompts)


def make_parser() -> CommandParser:
    """Make the parser of the command."""
    parser = CommandParser("generate", "Answer prompts by an adapter, or by several side by side.")
    add_options(parser)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a request; repeat it")
    parser.add_argument(
        "--file",
        metavar="FILE",
        help="requests: a file of rows as for training, or a text; - is what is piped in",
    )
    parser.add_argument("--json", action="store_true", help="print requests and answers as JSON")
    return parser


def answer_prompts(arguments: Mapping[str, Any]) -> None:
    """Answer prompts, and print the answers.

    Raises:
        ValueError: if there is nothing to answer, or for a request that cannot be carried out.
    """
    requests = [[Turn("user", text)] for text in arguments["prompt"]]
    if arguments["file"] is not None:
        requests += _read_requests(arguments["file"])
    if not requests:
        raise ValueError("nothing to answer: give --prompt TEXT or --file FILE")
    console = Console(stderr=True)
    speakers = set_up_speakers(arguments, console)
    conversations = [[*opening(arguments["system"]), *turns] for turns in requests]
    for note in speakers.notes:
        console.print(note, highlight=False, markup=False)
    if len(requests) == 1 and len(speakers.records) == 1 and not arguments["json"]:
        _stream(speakers, conversations[0])
        return
    answers: list[dict[str, str]] = []
    with counting_bar() as bar:
        task = bar.add_task("Answering", total=len(conversations))
        size = speakers.generator.batch_size
        for start in range(0, len(conversations), size):
            batch = conversations[start : start + size]
            found = speakers.answer(dict.fromkeys(speakers.records, batch))
            answers += [{name: each[i].text for name, each in found.items()} for i in range(len(batch))]
            bar.advance(task, len(batch))
    if arguments["json"]:
        pairs = zip(requests, answers, strict=True)
        print_json([{"messages": [_message(turn) for turn in turns], "answers": said} for turns, said in pairs])
        return
    for turns, said in zip(requests, answers, strict=True):
        print(f"> {turns[-1].content}")  # noqa: T201 - what was asked for
        for name, text in said.items():
            shown = text if text.strip() else NO_TEXT
            print(f"{name}: {shown}" if len(said) > 1 else shown)  # noqa: T201
        print()  # noqa: T201


def _stream(speakers: Speakers, conversation: Sequence[Turn]) -> None:
    """Print the answer of the one adapter as it comes."""
    shown = 0

    def show(_name: str, _i: int, text: str) -> None:
        nonlocal shown
        sys.stdout.write(text[shown:])
        sys.stdout.flush()
        shown = len(text)

    (said,) = speakers.answer({name: [conversation] for name in speakers.records}, show).values()
    print(said[0].text[shown:])  # noqa: T201 - the rest of it
    if not said[0].text.strip():
        print(NO_TEXT, file=sys.stderr)  # noqa: T201 - the output is the answer alone


def _message(turn: Turn) -> dict[str, str]:
    return {"role": turn.role, "content": turn.content}


def _read_requests(source: str) -> list[list[Turn]]:
    """Read requests from a file of rows, or one from a text.

    Raises:
        ValueError: for a row that holds none.
        OSError: if the file cannot be read.
    """
    if source != "-" and is_row_file(Path(source).name):
        return [_request_of(row) for row in read_rows(expanded(source))]
    text = sys.stdin.read() if source == "-" else expanded(source).read_text(encoding="utf-8-sig")
    return [[Turn("user", text.rstrip("\n"))]] if text.strip() else []


def _request_of(row: Row) -> list[Turn]:
    if row.error:
        raise ValueError(f"{row.where}: {row.error}")
    try:
        return request_of(row.value)
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from None
