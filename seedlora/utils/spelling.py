"""Guess which name a misspelt one was meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the one of the known names that a name is nearest to, whatever their case; None if it is near to none."""
    names = {each.lower(): each for each in known}
    return next((names[found] for found in difflib.get_close_matches(name.lower(), names, n=1)), None)
