"""All that is used of argparse, and of jsonargparse on top of it, beyond what their documentation promises.

``tests/cli/test_argparse_internals.py`` fails by the function's name when a release takes one of these away.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator


def arguments_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return the arguments of a parser in the order in which they were added, its list ``_actions``."""
    return list(parser._actions)


def option_names(parser: argparse.ArgumentParser) -> list[str]:
    """Return the names of all options of a parser, with their dashes: of its arguments, options have names."""
    return [name for argument in arguments_of(parser) for name in argument.option_strings]


def option_groups(parser: argparse.ArgumentParser) -> Iterator[tuple[str, list[str], str]]:
    """Give each group of options in the help of a parser: its title, the names of its options, and its help text.

    Groups without options are left out. ``_action_groups``, ``_group_actions`` and ``_get_formatter`` are what
    ``format_help`` itself is made of, which shows all groups or none. jsonargparse's formatter works only within its
    ``format_help``, so this is to be called there.
    """
    for group in parser._action_groups:
        names = [name for action in group._group_actions for name in action.option_strings]
        if not names:
            continue
        title, formatter = str(group.title or ""), parser._get_formatter()
        formatter.start_section(title)
        formatter.add_arguments(group._group_actions)
        formatter.end_section()
        yield title, names, formatter.format_help()
