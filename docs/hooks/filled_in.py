"""The parts of pages that are made of the code: a comment ``<!-- filled in: KIND NAME -->`` stands in their place."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from docs.hooks.method_table import method_table
from docs.hooks.option_lists import command_options, data_options, train_options, trainer_options
from docs.hooks.record_tables import record_table

#: What makes the text for each kind of comment; it gets the rest of the comment.
FILLED_IN: Mapping[str, Callable[[str], str]] = {
    "record": record_table,
    "options of train.py": lambda _: train_options(),
    "options of the Trainer": lambda _: trainer_options(),
    "options of data modules": lambda _: data_options(),
    "options of command": command_options,
    "merge rules": lambda _: method_table(),
}
_COMMENT = re.compile(rf"<!-- filled in: ({'|'.join(FILLED_IN)})(?: (.*?))? -->")


def filled_in(markdown: str) -> str:
    """Return a page with the text that its comments ask for."""
    return _COMMENT.sub(lambda found: FILLED_IN[found[1]](found[2] or ""), markdown)
