"""Files are whole or absent."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file

from seedlora.utils.files import atomic_file, atomic_folder, saving, write_text
from tests.helpers.disk import files_of_at_most


def test_an_error_leaves_the_old_file_and_no_rest(tmp_path):
    write_text(tmp_path / "x", "old")
    with pytest.raises(OSError, match="full"), atomic_file(tmp_path / "x") as file:
        file.write_text("half")
        raise OSError("disk full")
    assert (tmp_path / "x").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_an_error_leaves_the_old_folder_and_no_rest(tmp_path):
    with atomic_folder(tmp_path / "d") as folder:
        (folder / "a").write_text("old")
    with pytest.raises(OSError, match="full"), atomic_folder(tmp_path / "d") as folder:
        (folder / "a").write_text("half")
        raise OSError("disk full")
    assert (tmp_path / "d" / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def with_open(tensors, path):
    with open(path, "wb") as file:
        torch.save(tensors, file)


def text(tensors, path):
    path.write_text(str(tensors["x"].tolist()))


@pytest.mark.parametrize("write", [save_file, torch.save, with_open, text])
def test_a_full_disk_is_one_sentence_whoever_writes(tmp_path, write):
    (tmp_path / "x").write_text("old")
    message = (
        r"x was not written: (File too large|torch.save could not write all of it); it takes 0\.1 MiB, [\d,.]+ MiB"
    )
    with pytest.raises(OSError, match=message + " are free there; the older one is untouched$"):  # noqa: SIM117
        with files_of_at_most(10_000), saving(tmp_path / "x", size=80_000):
            write({"x": torch.arange(20_000).float()}, tmp_path / "y")


@pytest.mark.parametrize("error", [RuntimeError("of another kind"), FileNotFoundError(2, "No such file", "z")])
def test_other_errors_are_what_they_were(tmp_path, error):
    with pytest.raises(type(error)) as caught, saving(tmp_path / "x"):
        raise error
    assert caught.value is error


def test_a_folder_is_replaced_whole(tmp_path):
    for content in ("a", "b"):
        with atomic_folder(tmp_path / "d") as folder:
            (folder / content).write_text(content)
    assert [path.name for path in tmp_path.rglob("*")] == ["d", "b"]


def test_links_stay_links(tmp_path):
    (tmp_path / "disk").mkdir()
    for name in ("folder", "file"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    for content in ("a", "b"):  # a link to nothing, and to something
        with atomic_folder(tmp_path / "folder") as folder:
            (folder / content).write_text(content)
        write_text(tmp_path / "file", content)
    assert (tmp_path / "folder").is_symlink()
    assert (tmp_path / "file").is_symlink()
    assert sorted(path.name for path in (tmp_path / "disk").rglob("*")) == ["b", "file", "folder"]
    assert (tmp_path / "disk" / "file").read_text() == "b"


def test_the_files_of_a_folder_follow_the_umask(tmp_path):
    """safetensors makes its files for their owner alone: a server under another account could not read an adapter."""
    before = os.umask(0o022)
    try:
        for umask, mode in ((0o022, 0o644), (0o077, 0o600)):
            os.umask(umask)
            with atomic_folder(tmp_path / "d") as folder:
                save_file({"a": torch.zeros(1)}, folder / "weights")
                (folder / "text").write_text("a")
            assert {path.stat().st_mode & 0o777 for path in (tmp_path / "d").iterdir()} == {mode}
    finally:
        os.umask(before)
