"""Find folders that may lie on the model hub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

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


class HubName(NamedTuple):
    """Names a folder on the hub: ``owner/name@revision:sub/folder``, of which the last two may be left out."""

    repository: str
    revision: str | None
    subfolder: str | None


#: A repository, a branch, tag or commit of it, and a folder in it that does not lead out of it.
_HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:@([\w./-]+))?(?::((?!\.)[\w.-]+(?:/(?!\.)[\w.-]+)*))?")


def parse_hub_name(text: str) -> HubName | None:
    """Read the name of a folder on the hub; None if it is none.

    Example:
        >>> parse_hub_name("owner/name@v2:checkpoint-10")
        HubName(repository='owner/name', revision='v2', subfolder='checkpoint-10')
        >>> parse_hub_name("a/b/c"), parse_hub_name("owner/name:../other")
        (None, None)
    """
    found = _HUB_NAME.fullmatch(text)
    return None if found is None else HubName(found[1], found[2], found[3])


def local_folder(source: str | Path, kind: str, patterns: Sequence[str], *, cached: bool = False) -> Path:
    """Return a folder as it is, or the snapshot of a folder on the hub: :class:`HubName`.

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
    name = None if path.exists() else parse_hub_name(str(source))
    if name is None:
        raise ValueError(
            f"{source} is no folder; give a {kind} or a hub id (owner/name, owner/name@revision:subfolder)"
        )
    from huggingface_hub import snapshot_download

    try:
        wanted = [f"{name.subfolder}/{pattern}" if name.subfolder else pattern for pattern in patterns]
        with nullcontext() if cached else hub():
            snapshot = snapshot_download(
                name.repository, revision=name.revision, allow_patterns=wanted, local_files_only=cached
            )
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{source} is no local folder and could not be read from the hub: {reason}") from None
    folder = Path(snapshot, name.subfolder or "")
    if not folder.is_dir():
        raise ValueError(f"{name.repository} has no folder {name.subfolder} at {name.revision or 'its main branch'}")
    return folder
