"""Errors of the command lines, in one sentence."""

from __future__ import annotations

import re
import sys

#: What values are, for people.
KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "Sequence": 'a list such as "[1,2]"',
    "Mapping": 'a mapping such as "{name: value}"',
}


class UsageError(ValueError):
    """A request that cannot be carried out; the message is one sentence for the user."""


def plain_message(message: str) -> str:
    """One sentence of what jsonargparse says about a value: the cause alone, with the option by its name."""
    message, option, given = missing_value(one_line(message)), "", ""
    while True:
        if found := re.match(r'Parser key "([\w.]+)": (.*)', message):
            option, message = f"{option}.{found[1]}".strip("."), found[2]
        elif found := re.search(r"Errors: - (.*) - Expected a <class 'NoneType'>.*?Given value: (.*)", message):
            message, given = found[1], found[2]
        else:
            break
    if kind := re.fullmatch(r"Expected a <class '(?:.*\.)?(\w+)'>(?:\. Got value: (.*))?", message):
        return f"--{option} takes {KINDS.get(kind[1], kind[1])}, got {kind[2] or given}"
    if choices := re.findall(r"typing\.Literal\[(.*?)\]", message):
        return f"--{option} takes one of {', '.join(choices)}, got {given}"
    if option and message.startswith("--"):  # the parser of a data module has been here
        return f"--{option}.{message[2:]}"
    return f"--{option}: {message}" if option else message


def missing_value(message: str) -> str:
    """Say of an option without a value, which argparse calls an argument by all its spellings, that one is missing.

    >>> missing_value("argument --seeds/--seeds+: expected one argument")
    '--seeds needs a value'
    """
    found = re.match(r"argument (-[\w.-]+)\S*: expected (?:one|at least one) argument", message)
    return message if found is None else f"{found[1]} needs a value{message[found.end() :]}"


def refuse(error: ValueError | OSError) -> int:
    """Say on stderr in one sentence why ``train.py`` does not do what was asked; returns its exit code."""
    reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
    print(f"error: {plain_message(reason)}", file=sys.stderr)  # noqa: T201
    return 2


def one_line(message: str) -> str:
    """Join the lines of a message."""
    return " ".join(message.split())
