"""Catch whatever comes out of a command: one line for people, and a file with all of it."""

from __future__ import annotations

import io
import os
import platform
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from seedlora import __version__
from seedlora.cli.errors import one_line
from seedlora.cli.option_words import command_words
from seedlora.utils.options import naming_options
from seedlora.utils.places import expanded, without_home


def run_guarded(run: Callable[[], int], command: Sequence[str]) -> int:
    """Run a command; an error that nobody has thought of becomes one line and the place of a full log.

    Args:
        run: does what is asked for, and returns the exit code.
        command: its words, for the log.

    Returns:
        The exit code: 1 after such an error, or when whoever reads the output has left.
    """
    write_any_text()
    try:
        with naming_options(command_words):
            return run()
    except BrokenPipeError:  # the output goes to a command such as head, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except Exception as error:  # whatever it is, a page of code says nothing to who has asked for an adapter
        said = one_line(str(error))[:300]
        what = f"{type(error).__name__}: {said}" if said else type(error).__name__
        _say(f"error: {what} (not foreseen; {_write_log(command)})")
        return 1


def with_home(words: Sequence[str]) -> list[str]:
    """Return the words of a command line with ``~`` as the home folder, also behind ``=``, which shells leave as it is.

    Raises:
        ValueError: if no home folder is known.
    """
    return [_word_with_home(word) for word in words]


def write_any_text() -> None:
    """Let the output take every character: what its encoding has not is written as a code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _word_with_home(word: str) -> str:
    name, equals, value = word.rpartition("=")
    path = value if equals else word
    if not path.startswith(("~/", "~\\")) and path != "~":
        return word
    return f"{name}{equals}{expanded(path)}"


def _write_log(command: Sequence[str]) -> str:
    """Write what is known of the error at hand into a file; return where it is, for people."""
    facts = [f"seedlora {__version__}, Python {platform.python_version()}, {platform.platform()}", shlex.join(command)]
    text = without_home("\n".join([*facts, "", traceback.format_exc()]))
    try:
        descriptor, name = tempfile.mkstemp(prefix="seedlora-error-", suffix=".log")
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError as error:
        return f"its log could not be written: {error}"
    return f"the full log, for a bug report, is {Path(name)}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - it is for whoever gave the command
