"""Know the places of this machine's user: the home folder, which ``~`` stands for, and the cache."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

#: Characters that go on with the name of a folder.
_IN_NAMES = r"\w.-"


def home_folder() -> Path | None:
    """Return the home folder; None if the system knows none, as in a container under a number without a name."""
    try:
        return Path.home()
    except (RuntimeError, KeyError):
        return None


def expanded(path: str | Path) -> Path:
    """Return a path in which a ``~`` at the beginning has become the home folder.

    Raises:
        ValueError: if nobody knows the home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{path}: no home folder is known that ~ could stand for; write the whole path") from None


def without_home(text: str, *, below: bool = False) -> str:
    """Return a text for others, JSON perhaps, in which paths of the home folder begin with ``~``.

    Args:
        text: to be sent.
        below: leave the folder itself as it is: ``~`` alone is nothing in YAML.
    """
    home = home_folder()
    if home is None or len(str(home)) < 2:
        return text
    forms = "|".join(re.escape(form) for form in {str(home), json.dumps(str(home))[1:-1]})
    return re.sub(rf"(?:{forms})(?{'=/' if below else '![' + _IN_NAMES + ']'})", "~", text)


def user_cache() -> Path:
    """Return ``$SEEDLORA_CACHE``, or ``seedlora`` in the user's cache folder.

    Raises:
        OSError: if no such folder is known.
    """
    if chosen := os.environ.get("SEEDLORA_CACHE"):
        return expanded(chosen)
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "seedlora"
    if (home := home_folder()) is None:
        raise OSError("no home folder is known, so there is no place for a cache: set SEEDLORA_CACHE to a folder")
    return home / ".cache" / "seedlora"
