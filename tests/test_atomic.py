"""Files are whole or absent."""

from __future__ import annotations

import pytest

from seedlora.atomic import atomic_file, atomic_folder, write_text


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


def test_a_folder_is_replaced_whole(tmp_path):
    for content in ("a", "b"):
        with atomic_folder(tmp_path / "d") as folder:
            (folder / content).write_text(content)
    assert [path.name for path in tmp_path.rglob("*")] == ["d", "b"]
