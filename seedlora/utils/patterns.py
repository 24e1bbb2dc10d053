"""Take regular expressions from strangers: only those that end in time, matched to layers by PEFT's rule.

Python's matcher tries every way in which a pattern could be laid over a text before it says no. One repetition inside
another, as in ``(a+)+$``, has as many ways as there are subsets of the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib import import_module
from typing import Any

#: Characters of a layer's path, of which an open repetition may take any number.
_PATH_LENGTH = 64
#: Ways to lay a pattern over a path: three open repetitions, as in ``.*attn.*proj``, and a few choices.
_MOST_WAYS = 2**22
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
        re.compile(pattern)
        ways = _ways(_PARSER.parse(pattern), repeated=False)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"it is no regex: {error}") from None
    if ways > _MOST_WAYS:
        raise ValueError("it repeats what varies itself, or repeats too often: to match it could take for ever")


def pattern_key(keys: Iterable[str], path: str) -> str:
    """Return the first of the keys of ``rank_pattern`` or ``alpha_pattern`` that matches a layer's path, or the path.

    This is PEFT's rule (``get_pattern_key``), without the seconds that PEFT takes to import; its test compares them.

    Raises:
        re.error: if a key is no regular expression.

    Example:
        >>> pattern_key(["v_proj", "up_proj"], "model.layers.0.mlp.up_proj")
        'up_proj'
    """
    return next((key for key in keys if re.match(rf"(.*\.)?({key})$", path)), path)


def _ways(parsed: Any, *, repeated: bool) -> int:
    """Return in how many ways, at most, a pattern can be laid over a path; more than are allowed if it is too many.

    Args:
        parsed: a part of a pattern, as Python's parser gives it.
        repeated: whether that part is repeated itself: then it must not vary.
    """
    ways = 1
    for operation, argument in parsed:
        name = str(operation)
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            least, most, body = argument
            choices = min(most - least, _PATH_LENGTH - 1) + 1
            ways *= choices * _ways(body, repeated=repeated or most > 1)
        elif name == "BRANCH":
            # Names of layers that are listed differ from each other, so that hardly more than one begins right.
            choices = 2
            ways *= choices * max(_ways(branch, repeated=repeated) for branch in argument[1])
        else:
            choices = 1
            parts = argument if isinstance(argument, tuple | list) else (argument,)
            for part in parts:
                ways *= _ways(part, repeated=repeated) if isinstance(part, _PARSER.SubPattern) else 1
        if (repeated and choices > 1) or ways > _MOST_WAYS:
            return _MOST_WAYS + 1
    return ways
