"""Folders that may lie on the model hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path


def local_folder(source: str | Path, kind: str, patterns: Sequence[str], *, cached: bool = False) -> Path:
    """A folder as it is, or the snapshot of a hub repository named ``owner/name``.

    Args:
        source: folder or hub id.
        kind: what it should be, for the message: ``PEFT adapter folder``.
        patterns: the files that are wanted of a repository.
        cached: download nothing; take a snapshot that is on this machine.

    Raises:
        ValueError: if there is neither; the message says why.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
        raise ValueError(f"{source} is no folder; give a {kind} or a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=list(patterns), local_files_only=cached))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{source} is no local folder and could not be read from the hub: {reason}") from None
