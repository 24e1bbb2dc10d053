"""Name an option in the words of whoever reads a sentence: as an argument of Python, or as one of the command line.

A sentence that tells somebody to use an option has ``name_option("ensemble.resume", True)`` in the place of its name.
That is as Python has it, except inside :func:`naming_options`, where a command line runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final


class _Unset:
    """Stands for an option that is named without a value."""


UNSET: Final = _Unset()
#: Returns an option, given by its full name such as ``trainer.max_epochs`` and a value or :data:`UNSET`, as words.
Naming = Callable[[str, object], str]


def python_argument(name: str, value: object = UNSET) -> str:
    """Return an option as an argument of Python: of the callback, the module, the data module or the Trainer.

    Example:
        >>> python_argument("ensemble.budget", "full"), python_argument("ensemble.dirpath")
        ("budget='full'", 'dirpath')
    """
    argument = name.partition(".")[2]
    return argument if value is UNSET else f"{argument}={value!r}"


_NAMING: ContextVar[Naming] = ContextVar("naming", default=python_argument)


@contextmanager
def naming_options(naming: Naming) -> Iterator[None]:
    """Have sentences name options in another way, inside."""
    token = _NAMING.set(naming)
    try:
        yield
    finally:
        _NAMING.reset(token)


def name_option(name: str, value: object = UNSET) -> str:
    """Return an option in the words of whoever reads it.

    Args:
        name: in full: ``ensemble.``, ``trainer.``, ``model.`` or ``data.`` and the argument's name.
        value: that is meant. Default: the option is named alone.

    Example:
        >>> name_option("ensemble.resume", True)
        'resume=True'
        >>> with naming_options(lambda name, value: f"--{name}"):
        ...     name_option("ensemble.resume", True)
        '--ensemble.resume'
    """
    return _NAMING.get()(name, value)


def name_options(sentence: str) -> str:
    """Return a sentence that was written down before it has a reader, with its options in the reader's words.

    Example:
        >>> name_options("{ensemble.ema} averages the weights of each replica")
        'ema averages the weights of each replica'
    """
    return re.sub(r"\{([a-z_]+(?:\.[a-z_]+)+)\}", lambda found: name_option(found[1]), sentence)
