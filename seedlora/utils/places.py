"""Know the places of this machine's user: the home folder, which ``~`` stands for, and the cache."""

from __future__ import annotations

import os
import re
from pathlib import Path


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


def without_home(text: str) -> str:
    """Return a text for others, in which paths of the home folder begin with ``~``."""
    home = home_folder()
    if home is None or len(str(home)) < 2:
        return text
    return re.sub(rf"{re.escape(str(home))}(?![\w.-])", "~", text)


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
