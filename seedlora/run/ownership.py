"""Own a run's folder: one process at a time, on this machine or on others that share the folder.

The owner is named in ``owner.json``, which is made whole under another name and then linked to its own: of several
processes that do so at once a file system lets one succeed, NFS too, and no lock of the system is needed. What a
process leaves that is gone is replaced under a lock of the same kind, named by the token in it, so that only one of
several that find it can replace it, and never the file of a new owner.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from seedlora.records.owner import OWNER, OwnerRecord
from seedlora.utils.files import write_text

#: Seconds that a file may be without content, where it cannot be made by a link.
_PATIENCE = 2.0


def take_folder(folder: Path) -> OwnerRecord:
    """Make a folder this process's own; it is made if it is not there.

    Returns:
        What is to be given to :func:`leave_folder`.

    Raises:
        ValueError: naming process and host, if another one owns it, or may still do.
        OSError: if the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = _this_process()
    _take(folder / OWNER.name, own)
    return own


def leave_folder(folder: Path, own: OwnerRecord) -> None:
    """Give a folder up, if it is still this process's."""
    file = folder / OWNER.name
    with suppress(ValueError, OSError):
        if _read(file) == own:
            file.unlink()


def is_at_work(folder: Path) -> bool:
    """Return whether a process owns a folder and has not certainly ended.

    Raises:
        ValueError: if the file that names it cannot be read.
    """
    owner = _read(folder / OWNER.name)
    return owner is not None and not is_gone(owner)


def _take(file: Path, own: OwnerRecord) -> None:
    """Put our record into a file that is not there, or whose owner is gone."""
    while not _create(file, own):
        found = _read(file)
        if found is None:
            continue  # it was given up a moment ago
        if found == own:
            return  # NFS may say that a link was there which it has just made
        if not is_gone(found):
            raise ValueError(_in_use(file, found))
        # Others may have found the same. Who owns this name replaces the file, if it has not been replaced before.
        successor = file.with_name(f".{file.name}.{found['token']}")
        _take(successor, own)
        try:
            if _read(file) == found:
                write_text(file, OWNER.text(own))
                return
        finally:
            successor.unlink()


def _create(file: Path, own: OwnerRecord) -> bool:
    """Write a file that is not there; return whether that was so."""
    whole = file.with_name(f".{file.name}.{own['token']}.tmp")
    write_text(whole, OWNER.text(own))
    try:
        os.link(whole, file)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        return _create_in_place(file, own)
    finally:
        whole.unlink(missing_ok=True)
    return True


def _create_in_place(file: Path, own: OwnerRecord) -> bool:
    """Do the same where a file has one name: it has no content for a moment."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w", encoding="utf-8") as opened:
        opened.write(OWNER.text(own))
    return True


def _read(file: Path) -> OwnerRecord | None:
    """Return whose a file is; None if it is not there.

    Raises:
        ValueError: if it cannot be read, with what to do.
    """
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            return OWNER.read_file(file)
        except FileNotFoundError:
            return None
        except ValueError as error:
            if time.monotonic() > until:
                raise ValueError(f"{error}; remove it if no process is at work in {file.parent}") from None
        time.sleep(0.05)


def _this_process() -> OwnerRecord:
    process = os.getpid()
    return {
        "host": socket.gethostname(),
        "process": process,
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        "started": started_at(process),
        "machine": _text("/etc/machine-id"),
        "boot": _text("/proc/sys/kernel/random/boot_id"),
        "namespace": _namespace(),
        "token": uuid.uuid4().hex,
    }


def is_gone(owner: OwnerRecord) -> bool:
    """Return whether the process of a record has certainly ended; of another machine or container that is not known."""
    here = _this_process()
    same_machine = owner["host"] == here["host"] and owner["machine"] == here["machine"]
    if not same_machine:
        return False
    if owner["boot"] != here["boot"]:
        return owner["machine"] is not None  # or it may be another machine of this name
    if owner["namespace"] != here["namespace"]:
        return False
    return not _is_alive(owner["process"]) or started_at(owner["process"]) != owner["started"]


def _is_alive(process: int) -> bool:
    """Return whether there is a process of this number that has not ended."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    status = _stat(process)
    return status is None or status[0] not in "ZX"  # ended, and nobody has asked how


def started_at(process: int) -> int | None:
    """Return the clock ticks between the start of the machine and that of a process, which no clock changes."""
    status = _stat(process)
    return None if status is None else int(status[19])


def _stat(process: int) -> list[str] | None:
    """Return what Linux says of a process, from its state on; None elsewhere."""
    text = _text(f"/proc/{process}/stat")
    return None if text is None else text.rpartition(")")[2].split()


def _namespace() -> str | None:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip() or None
    except OSError:
        return None


def _in_use(file: Path, owner: OwnerRecord) -> str:
    """Say whose the folder is, and what to do."""
    whose = f"process {owner['process']} on {owner['host']}"
    says = f"{file.parent} is in use: {whose} has been at work in it since {owner['since']}"
    here = _this_process()
    if owner["process"] == here["process"] and owner["started"] == here["started"]:
        return f"{says}, and that is this very process, by another callback"
    if all(owner[key] == here[key] for key in ("host", "machine", "boot", "namespace")):
        return f"{says}; wait until it ends, or end it"
    unknown = "whether that process is still there cannot be told from this machine or container"
    return f"{says}; {unknown}: if it is not, remove {file} and try again"
