"""Write files and folders so that each is either whole or absent: beside their place, flushed to disk, then renamed."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

#: No space left, none left of the user's share, a file above the limit on files.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` as one step; a crash leaves the old file or none, never a part.

    Raises:
        OSError: if the disk is full or the folder cannot be written; ``path`` is then as it was.
    """
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json_lines(path: Path, rows: Iterable[object]) -> None:
    """Write rows as JSON, one a line, as :func:`write_text` does."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_files(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Write files into a folder that is not in use yet, by their names in it; texts as UTF-8."""
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))


@contextmanager
def saving(path: Path, *, size: int | None = None) -> Iterator[None]:
    """Turn a write that fails for want of room into one sentence, whichever library wrote inside the block.

    safetensors and torch.save raise errors of their own then.

    Args:
        path: what is being written, for the message; its folder exists.
        size: about how many bytes that takes, if it is known.

    Raises:
        OSError: saying what was not written, why, and how much room there is. Other errors pass.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if (reason := _no_room(error)) is None:
            raise
        takes = "" if size is None else f"it takes {_mib(size)}, "
        kept = "; the older one is untouched" if path.exists() else ""
        free = shutil.disk_usage(path.parent).free
        raise OSError(f"{path} was not written: {reason}; {takes}{_mib(free)} are free there{kept}") from error


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to; it becomes ``path`` when the block ends without an error.

    What a link points to is replaced, not the link.
    """
    path = path.resolve() if path.is_symlink() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with saving(path):
        try:
            yield temporary
            _fsync(temporary)
            os.replace(temporary, path)
            _fsync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, *, size: int | None = None) -> Iterator[Path]:
    """Give an empty temporary folder to fill; it becomes ``path`` when the block ends without an error.

    An older folder of that name is replaced. Between its removal and the rename neither exists, so a crash in that
    moment loses the old one but never shows a mixture. What a link points to is replaced, not the link. The files are
    as readable as the umask says, also those that safetensors makes for their owner alone.

    Args:
        path: the folder.
        size: about how many bytes it will take, for the message of :func:`saving`.
    """
    path = path.resolve() if path.is_symlink() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    outer = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    with saving(path, size=size):
        try:
            temporary = outer / path.name
            temporary.mkdir()
            yield temporary
            mode = temporary.stat().st_mode & 0o666
            for file in temporary.rglob("*"):
                if file.is_file() and not file.is_symlink():
                    file.chmod(mode)
            sync(temporary)
            if path.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
                os.replace(path, old / path.name)
                os.replace(temporary, path)
                shutil.rmtree(old)
            else:
                os.replace(temporary, path)
            _fsync(path.parent)
        finally:
            shutil.rmtree(outer, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder, if it is there, as one step: a crash leaves all of it under its name, or nothing."""
    if path.is_dir():
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        os.replace(path, temporary / path.name)
        shutil.rmtree(temporary)


def sync(path: Path) -> None:
    """Flush a file, or a folder and all that is in it, to the disk."""
    for item in path.rglob("*"):
        _fsync(item)
    _fsync(path)


def _no_room(error: Exception) -> str | None:
    """Return the system's words for a lack of room, if that is what an error says; else None."""
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, SafetensorError) and (said := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(said[1])
    if number in _NO_ROOM:
        return os.strerror(number)
    # torch.save's writer, which does not say why, and whose error hides the system's.
    return "torch.save could not write all of it" if "inline_container" in str(error) else None


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
