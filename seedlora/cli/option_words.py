"""Short options of ``train.py``, and every option as words of a command line."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from seedlora.names import ALL_CONTROLS
from seedlora.utils.options import UNSET

SHORT = {
    "--merge": "--ensemble.merge",
    "--compare": "--ensemble.compare",
    "--controls": "--ensemble.controls",
    "--resume": "--ensemble.resume",
    "--evaluate": "--evaluate.task",
}
#: What the short options mean that are given without a value.
BARE = {"--resume": "true", "--controls": ALL_CONTROLS}
_SHORTENED = {long: short for short, long in SHORT.items()}


def command_words(name: str, value: object = UNSET) -> str:
    """Return an option as it is typed, by its short name where it has one.

    Example:
        >>> command_words("ensemble.budget", "full"), command_words("ensemble.resume", True)
        ('--ensemble.budget full', '--resume')
        >>> command_words("ensemble.merge_options", {"p": 0.5}), command_words("ensemble.dirpath")
        ("--ensemble.merge_options '{p: 0.5}'", '--ensemble.dirpath')
    """
    word = _SHORTENED.get(f"--{name}", f"--{name}")
    if value is UNSET:
        return word
    typed = shlex.quote(_typed(value))
    return word if BARE.get(word) == typed else f"{word} {typed}"


def _typed(value: object) -> str:
    """Return a value as YAML has it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_typed(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_typed, value)) + "]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)
