"""A cache that cannot be written: what is in it is read, and what is not is said."""

from __future__ import annotations

import os
import subprocess

import pytest

from seedlora.datamodules.cache import cached_rows
from seedlora.datamodules.rows import Counts, empty_chunk


def make():
    return [empty_chunk(Counts(read=3))]


@pytest.fixture
def read_only(tmp_path, monkeypatch):
    """A cache with the rows of ``key`` in it, to which nobody may write: root may, unless the file system may not."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SEEDLORA_CACHE", str(folder))
    cached_rows("key", make)
    (folder / "data").chmod(0o500)
    mounted = False
    if os.geteuid() == 0:
        words = ["mount", "--bind", "-o", "ro", str(folder), str(folder)]
        mounted = subprocess.run(words, capture_output=True, check=False).returncode == 0
    if os.access(folder / "data", os.W_OK):
        pytest.skip("nothing can be made read-only for this user")
    yield
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)
    (folder / "data").chmod(0o700)


@pytest.mark.usefixtures("read_only")
def test_a_read_only_cache_gives_what_is_in_it_and_says_what_is_not():
    assert cached_rows("key", make).counts.read == 3
    with pytest.raises(OSError, match=r"cache/data, which cannot be written: .*; set SEEDLORA_CACHE to a folder"):
        cached_rows("another key", make)


def test_a_cache_where_no_folder_can_be_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SEEDLORA_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(OSError, match=r"below/data, which cannot be written: Not a directory; set SEEDLORA_CACHE"):
        cached_rows("key", make)
