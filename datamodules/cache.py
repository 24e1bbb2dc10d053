"""Keep tokenised rows on disk: made once by whoever comes first, and mapped into memory by all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from rich.console import Console

from seedlora.datamodules.rows import Chunk, Counts, TokenRows, add_counts

#: Part of every key: a change of what is stored, or of how it is made, leaves old folders unused.
FORMAT = 2


def cache_folder() -> Path:
    """Return where tokenised rows are: ``data`` in ``$SEEDLORA_CACHE``, or in ``seedlora`` in the user's
    cache folder.
    """
    if chosen := os.environ.get("SEEDLORA_CACHE"):
        return Path(chosen).expanduser() / "data"
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seedlora" / "data"
    except (RuntimeError, KeyError):
        raise OSError(
            "no home folder is known, so there is no place for a cache: set SEEDLORA_CACHE to a folder"
        ) from None


def cached_rows(key: object, make: Callable[[], Iterable[Chunk]]) -> TokenRows:
    """Return the rows that ``key`` stands for, from the disk; or make them and put them there.

    Processes that want the same rows at the same moment wait for the first of them, however long it takes, by a lock on
    a file; it is free again when its holder dies. A folder is there whole or not at all.

    Args:
        key: plain data that changes whenever the rows would.
        make: called without arguments; gives the rows as chunks.

    Raises:
        OSError: if they cannot be written.
    """
    digest = hashlib.blake2b(json.dumps([FORMAT, key], sort_keys=True).encode(), digest_size=16).hexdigest()
    folder = cache_folder() / digest
    if not folder.is_dir():
        _check_writable(folder.parent)
        with _locked(folder.with_suffix(".lock")):
            if not folder.is_dir():
                scratch = Path(tempfile.mkdtemp(prefix=f".{digest}.", dir=folder.parent))
                try:
                    _write(scratch, make())
                    os.replace(scratch, folder)
                finally:
                    shutil.rmtree(scratch, ignore_errors=True)
    return _read(folder)


def _check_writable(folder: Path) -> None:
    """Make the folder of the cache; raise OSError with what to do if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(
            f"tokenised rows are kept in {folder}, which cannot be written: {error.strerror}; set SEEDLORA_CACHE to a "
            "folder that can"
        ) from None


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    lock = FileLock(file)
    try:
        lock.acquire(timeout=2)
    except Timeout:
        Console(stderr=True).print("Another process is tokenising the same rows; waiting for it ...")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _write(folder: Path, chunks: Iterable[Chunk]) -> None:
    index, counts = [], Counts()
    with (folder / "tokens").open("wb") as tokens, (folder / "supervised").open("wb") as supervised:
        for chunk in chunks:
            tokens.write(chunk.tokens.tobytes())
            supervised.write(chunk.supervised.tobytes())
            index.append(np.stack([chunk.lengths, chunk.num_items, chunk.numbers]))
            counts = add_counts(counts, chunk.counts)
        for file in (tokens, supervised):
            file.flush()
            os.fsync(file.fileno())
    np.save(folder / "index.npy", np.concatenate([*index, np.empty((3, 0), np.int64)], axis=1))
    (folder / "counts.json").write_text(json.dumps(asdict(counts)), encoding="utf-8")


def _read(folder: Path) -> TokenRows:
    lengths, num_items, numbers = np.load(folder / "index.npy")
    total = int(lengths.sum())
    arrays = [
        # a file of no bytes cannot be mapped
        np.memmap(folder / name, dtype=dtype, mode="r", shape=(total,)) if total else np.empty(0, dtype)
        for name, dtype in (("tokens", np.int32), ("supervised", np.bool_))
    ]
    counts = Counts(**json.loads((folder / "counts.json").read_text(encoding="utf-8")))
    return TokenRows(arrays[0], arrays[1], np.cumsum(lengths) - lengths, lengths, num_items, numbers, counts)
