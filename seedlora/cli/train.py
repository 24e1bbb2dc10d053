"""Train from the command line. What needs no library is answered before Lightning is imported, which takes seconds."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from seedlora.cli.errors import refuse
from seedlora.cli.last_net import run_guarded
from seedlora.cli.train_help import help_text
from seedlora.cli.train_words import plan_seconds, read_words


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0; 2 for a request that cannot be carried out; 1 for a run that was interrupted or could not
        write, and for an error that was not foreseen. All say so in one sentence on stderr, the last one with the place
        of a full log.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    with _leaving_on_sigterm():
        return run_guarded(lambda: _main(words), ["python", "train.py", *words])


def _main(argv: Sequence[str]) -> int:
    started = time.monotonic()
    if not {"-h", "--help"}.isdisjoint(argv):
        print(help_text(), end="")  # noqa: T201 - what was asked for
        return 0
    try:
        words = read_words(argv)
    except (ValueError, OSError) as error:
        return refuse(error)
    from seedlora.cli.training_run import run

    return run(words, finished=list(argv[:1]) == ["test"], planning=plan_seconds(argv), started=started)


@contextmanager
def _leaving_on_sigterm() -> Iterator[None]:
    """A SIGTERM ends the run as Ctrl-C does, wherever the ensemble does not save a checkpoint first."""

    def leave(*_: object) -> None:
        raise SystemExit("terminated by SIGTERM")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
