"""Find folders that may lie on the model hub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from seedlora.utils.places import expanded


@contextmanager
def hub(seconds: float = 10.0) -> Iterator[None]:
    """Read repositories of the hub inside the block; outside of it, only what is on this machine is read.

    One question tells whether the hub answers. Its libraries would ask for each file six times in half a minute, and
    say so each time.

    Raises:
        OSError: for whatever goes wrong in the block, if the hub does not answer.
    """
    from huggingface_hub import constants, get_session

    offline = constants.HF_HUB_OFFLINE
    try:
        get_session().head(constants.ENDPOINT, timeout=seconds)
    except Exception:  # of several kinds, offline mode among them
        constants.HF_HUB_OFFLINE = True
    if constants.HF_HUB_OFFLINE is offline:
        yield
        return
    try:
        yield
    except Exception:
        raise OSError(f"{constants.ENDPOINT} does not answer") from None
    finally:
        constants.HF_HUB_OFFLINE = offline


def local_folder(source: str | Path, kind: str, patterns: Sequence[str], *, cached: bool = False) -> Path:
    """Return a folder as it is, or the snapshot of a hub repository named ``owner/name``.

    Args:
        source: folder or hub id.
        kind: what it should be, for the message: ``PEFT adapter folder``.
        patterns: the files that are wanted of a repository.
        cached: download nothing; take a snapshot that is on this machine.

    Raises:
        ValueError: if there is neither; the message says why.
    """
    path = expanded(source)
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
        raise ValueError(f"{source} is no folder; give a {kind} or a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        with nullcontext() if cached else hub():
            return Path(snapshot_download(str(source), allow_patterns=list(patterns), local_files_only=cached))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{source} is no local folder and could not be read from the hub: {reason}") from None
