"""All that is used of argparse beyond what its documentation promises.

``tests/cli/test_argparse_internals.py`` fails by the function's name when a release takes it away.
"""

from __future__ import annotations

import argparse


def arguments_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return the arguments of a parser in the order in which they were added, its list ``_actions``."""
    return list(parser._actions)
