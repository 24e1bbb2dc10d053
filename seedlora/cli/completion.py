"""The command ``completion``: print a script by which a shell completes commands and their options."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import shtab

from seedlora.cli.argparse_internals import arguments_of
from seedlora.cli.command_parser import CommandParser, run_command
from seedlora.cli.main import COMMANDS
from seedlora.cli.train_help import option_names

#: Commands whose options come from the signatures of classes, and are read by another parser.
_FROM_SIGNATURES = ("train", "preview")
#: What the values of options that are completed as paths are called in the help.
_PATHS = ("FILE", "FOLDER", "DIR", "[NAME=]DIR")


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    return run_command(make_parser(), argv, print_script)


def make_parser() -> CommandParser:
    """Make the parser of the command."""
    parser = CommandParser(
        "completion", 'Print a script by which a shell completes commands: eval "$(seedlora completion bash)".'
    )
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS, help="for which shell")
    return parser


def print_script(arguments: Mapping[str, Any]) -> None:
    """Print the script of a shell."""
    print(shtab.complete(all_commands(), arguments["shell"]))  # noqa: T201 - what was asked for


def all_commands() -> argparse.ArgumentParser:
    """Return a parser with a subparser for each command, which is read and never run."""
    root = argparse.ArgumentParser(prog="seedlora", description="Train, merge, inspect and compare LoRA adapters.")
    root.add_argument("--version", action="store_true", help="print the version")
    commands = root.add_subparsers()
    for name, command in COMMANDS.items():
        if name in _FROM_SIGNATURES:
            _add_options_of_training(commands.add_parser(name, help=command.summary), preview=name == "preview")
            continue
        parser: CommandParser = import_module(command.module).make_parser()
        for argument in arguments_of(parser):
            if not argument.option_strings or argument.metavar in _PATHS:
                argument.complete = shtab.FILE  # type: ignore[attr-defined] # where shtab looks for it
        commands.add_parser(name, help=command.summary, parents=[parser], add_help=False)
    return root


def _add_options_of_training(parser: argparse.ArgumentParser, *, preview: bool) -> None:
    """Add the options of ``train``, or those of them that ``preview`` has, by their names alone."""
    shown = ("--data", "--model.base_model") if preview else ("--",)
    for name in dict.fromkeys(option_names()):
        if name.startswith(shown) and name != "--help" and not name.endswith("+"):
            parser.add_argument(name)
