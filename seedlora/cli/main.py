"""Start one command: ``python -m seedlora COMMAND ...``. Each command is a module, imported when it is asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import NamedTuple

from seedlora import __version__
from seedlora.cli.last_net import run_guarded, write_any_text
from seedlora.utils.spelling import closest


class Command(NamedTuple):
    """Tell where a command is and what it does.

    Args:
        module: whose function ``main`` takes the words after the command, and returns the exit code.
        summary: what it does, in a line.
    """

    module: str
    summary: str


COMMANDS: Mapping[str, Command] = {
    "train": Command("seedlora.cli.train", "train seeds as one stack, merge and compare them (python train.py)"),
    "preview": Command("seedlora.cli.preview", "show rows of a data set as a model will see them"),
    "merge": Command("seedlora.cli.merge", "merge adapters into one, or into the base model"),
    "inspect": Command("seedlora.cli.inspect", "show ranks, norms and spectra of one adapter, and who serves it"),
    "compare": Command("seedlora.cli.compare", "show cosines, gains and spectra of several adapters"),
    "evaluate": Command("seedlora.cli.evaluate", "score adapters on tasks: GSM8K, MATH, HumanEval, ..."),
    "chat": Command("seedlora.cli.chat", "talk to an adapter, or to several side by side"),
    "generate": Command("seedlora.cli.generate", "answer prompts by an adapter, or by several side by side"),
    "serve": Command("seedlora.cli.serve", "start vLLM or llama.cpp for a run or an adapter, or print the command"),
    "export": Command("seedlora.cli.export", "write an adapter for llama.cpp and Ollama"),
    "push": Command("seedlora.cli.push", "send an adapter to the model hub"),
    "report": Command("seedlora.cli.report", "build the report of runs again, and compare several"),
    "methods": Command("seedlora.cli.methods", "show the table of merge methods"),
    "completion": Command("seedlora.cli.completion", "print a script by which bash, zsh or tcsh completes commands"),
    "doctor": Command("seedlora.cli.doctor", "show what is installed and what works, for a bug report"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: its name and its words. Default: those of the process.

    Returns:
        0; 2 if the input is bad: a sentence on stderr then says what was asked, given and allowed; 1 for an error that
        was not foreseen: a line then says where its log is.
    """
    write_any_text()
    name, *words = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        _print(help_text())
        return 0
    if name == "--version":
        _print(f"seedlora {__version__}")
        return 0
    if name not in COMMANDS:
        meant = closest(name, COMMANDS)
        hint = f"; did you mean {meant}?" if meant else "; --help says what they do"
        what = f"unknown command '{name}'" if name else "a command is missing"
        print(f"error: {what}; choose one of {', '.join(COMMANDS)}{hint}", file=sys.stderr)  # noqa: T201
        return 2
    return run_guarded(lambda: _run(name, words), ["python", "-m", "seedlora", name, *words])


def _run(name: str, words: Sequence[str]) -> int:
    run: Callable[[Sequence[str]], int] = import_module(COMMANDS[name].module).main
    return run(words)


def help_text() -> str:
    """Return what ``--help`` prints."""
    width = max(map(len, COMMANDS))
    rows = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: python -m seedlora COMMAND ...",
            "",
            "Train, merge, inspect and compare LoRA adapters. COMMAND --help shows the options of a command.",
            "In names of options - and _ are the same.",
            "",
            *rows,
            "",
            "  --version  print the version",
        ]
    )


def _print(text: str) -> None:
    print(text)  # noqa: T201 - what was asked for
