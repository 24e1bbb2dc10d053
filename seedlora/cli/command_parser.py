"""Read the options of a command of ``python -m seedlora``, and answer bad input, in the same way for all."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from seedlora.cli.argparse_internals import arguments_of
from seedlora.cli.errors import missing_value, one_line
from seedlora.cli.last_net import with_home
from seedlora.utils.spelling import closest

SOURCE_HELP = "the folder of a run, an adapter's folder or hub id, a whole model"
NAMED_BASE_HELP = "the base model; default: the one that the adapter names"
BASE_HELP = "the base model, for DoRA, PiSSA, OLoRA and embeddings; default: the one that the adapters name"


class CommandParser(argparse.ArgumentParser):
    """Read the options of one command: complaints are one sentence, and no option goes by half its name.

    Args:
        command: its name.
        description: what it does.
    """

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"python -m seedlora {command}", description=description, allow_abbrev=False)

    def parse(self, words: Sequence[str]) -> dict[str, Any]:
        """Read the words; in names of options ``-`` and ``_`` are the same, and ``~`` is the home folder.

        Raises:
            ValueError: for words that cannot be read.
        """
        return vars(self.parse_args([with_underscores(word) for word in with_home(words)]))

    def error(self, message: str) -> NoReturn:
        """Raise ValueError in the place of leaving the process."""
        if unknown := re.match(r"unrecognized arguments: (--\w+)", message):
            meant = closest(unknown[1], [name for option in arguments_of(self) for name in option.option_strings])
            message = f"unknown option {unknown[1]}" + (f"; did you mean {meant}?" if meant else "")
        raise ValueError(f"{missing_value(message)} (see {self.prog} --help)")


def with_underscores(word: str) -> str:
    """Spell the name of an option with ``_`` in the place of ``-``.

    >>> with_underscores("--task-path=my-file"), with_underscores("my-file")
    ('--task_path=my-file', 'my-file')
    """
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def run_command(parser: CommandParser, words: Sequence[str], run: Callable[[Mapping[str, Any]], None]) -> int:
    """Read the words of a command and run it.

    Returns:
        0, or 2 if the input is bad: a sentence on stderr then says what was asked, given and allowed.
    """
    # PEFT imports it, and it says what would make it faster.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        run(parser.parse(words))
    except (ValueError, OSError) as error:
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)
        print(f"error: {one_line(reason)}", file=sys.stderr)  # noqa: T201
        return 2
    return 0
