"""Take regular expressions from strangers: only those that end in time.

Python's matcher tries again from every place where a repetition could have stopped. One repetition inside another, as in
``(a+)+$``, takes exponential time on a name that does not match.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

#: Open repetitions one after the other, as in ``.*attn.*proj``: each one more multiplies the time by a name's length.
_MOST_REPETITIONS = 6
_LONGEST = 5000
#: Python's own parser of patterns; the test of this module fails if a release takes it away.
_PARSER: Any = import_module("re._parser")


def check_pattern(pattern: str) -> None:
    """Check that a regular expression can be read, and that it ends in time on names of layers.

    Raises:
        ValueError: saying what is wrong with it.
    """
    if len(pattern) > _LONGEST:
        raise ValueError(f"it has {len(pattern)} characters, over {_LONGEST}")
    try:
        parsed = _PARSER.parse(pattern)
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"it is no regular expression: {error}") from None
    if _open_repetitions(parsed, inside=False) > _MOST_REPETITIONS:
        raise ValueError(
            f"it repeats what repeats itself, or has more than {_MOST_REPETITIONS} open repetitions one after the "
            "other: to match it could take for ever"
        )


def _open_repetitions(parsed: Any, *, inside: bool) -> int:
    """Return how many open repetitions follow each other at most; too many if one is inside another.

    Args:
        parsed: a part of a pattern, as Python's parser gives it.
        inside: whether that part is repeated itself.
    """
    total = 0
    for operation, argument in parsed:
        name = str(operation)
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            _, most, body = argument
            is_open = most is _PARSER.MAXREPEAT or most > len(".model.layers.")
            if is_open and inside:
                return _MOST_REPETITIONS + 1
            total += is_open + _open_repetitions(body, inside=inside or is_open)
        elif name == "BRANCH":
            total += max(_open_repetitions(branch, inside=inside) for branch in argument[1])
        else:
            bodies = argument if isinstance(argument, tuple | list) else (argument,)
            total += sum(_open_repetitions(b, inside=inside) for b in bodies if isinstance(b, _PARSER.SubPattern))
    return total
