"""Who owns a run's folder: one process at a time, and none that is gone."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import subprocess
import sys

import pytest

from seedlora.records.owner import OWNER
from seedlora.run import ownership
from seedlora.run.ownership import is_gone, leave_folder, take_folder


@pytest.fixture
def other():
    """A process that does nothing."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


def record(process: int, **changes: object) -> dict[str, object]:
    """What a process writes that owns a folder."""
    own = {**ownership._this_process(), "process": process, "started": ownership.started_at(process)}
    return own | changes


def left(folder, content):
    folder.mkdir(exist_ok=True)
    (folder / "owner.json").write_text(json.dumps(content))


def test_a_folder_has_one_owner(tmp_path, other):
    folder = tmp_path / "run"
    left(folder, record(other.pid))
    host = ownership._this_process()["host"]
    message = (
        rf"^{re.escape(str(folder))} is in use: process {other.pid} on {host} has been at work in it since 20.*wait"
    )
    with pytest.raises(ValueError, match=message):
        take_folder(folder)
    other.kill()
    other.wait()
    own = take_folder(folder)
    assert OWNER.read(folder) == own
    assert own["process"] == os.getpid()
    with pytest.raises(ValueError, match="this very process, by another callback"):
        take_folder(folder)
    leave_folder(folder, own)
    assert not list(folder.iterdir())


def test_a_process_that_ended_and_was_not_waited_for_is_gone(other):
    found = record(other.pid)
    assert not is_gone(found)
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    assert is_gone(found)


@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        ({}, False),
        ({"started": 1}, True),  # the number belongs to another process now
        ({"boot": "an earlier one"}, True),
        ({"boot": "an earlier one", "machine": None}, False),
        ({"host": "elsewhere"}, False),
        ({"machine": "another of the same name"}, False),
        ({"namespace": "pid:[1]"}, False),
    ],
)
def test_what_is_known_of_an_owner(tmp_path, monkeypatch, changes, gone):
    here = {**ownership._this_process(), "machine": changes.get("machine", "m") and "m"}
    monkeypatch.setattr(ownership, "_this_process", lambda: here)
    folder, owner = tmp_path / "run", {**here, "token": "1", "process": os.getppid()}
    owner |= {"started": ownership.started_at(os.getppid()), **changes}
    assert is_gone(owner) == gone
    left(folder, owner)
    if gone:
        assert take_folder(folder) == here
        return
    unknown = rf"cannot be told from this machine or container: if it is not, remove {re.escape(str(folder))}/owner"
    with pytest.raises(ValueError, match=unknown if changes else "wait until it ends, or end it"):
        take_folder(folder)


def _try(folder, start, tried, found):
    start.wait()
    try:
        take_folder(folder)
        found.put(os.getpid())
    except ValueError:
        found.put(None)
    tried.wait()


@pytest.mark.parametrize("links", [True, False])
def test_of_several_that_find_a_folder_without_an_owner_one_takes_it(tmp_path, monkeypatch, other, links):
    """Also where the file system has no links."""
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links here")))
    gone = record(other.pid)
    other.kill()
    other.wait()
    fork, n = multiprocessing.get_context("fork"), 6
    for number in range(10):
        folder = tmp_path / str(number)
        if number % 2:
            left(folder, {**gone, "token": str(number)})
        start, tried, found = fork.Barrier(n), fork.Barrier(n), fork.SimpleQueue()
        processes = [fork.Process(target=_try, args=(folder, start, tried, found)) for _ in range(n)]
        for process in processes:
            process.start()
        winners = [winner for _ in processes if (winner := found.get()) is not None]
        for process in processes:
            process.join()
        assert len(winners) == 1
        assert OWNER.read(folder)["process"] == winners[0]
        assert [path.name for path in folder.iterdir()] == ["owner.json"]


def test_who_dies_while_it_replaces_an_owner_is_replaced_too(tmp_path, other):
    gone = record(other.pid)
    other.kill()
    other.wait()
    left(tmp_path, {**gone, "token": "first"})
    (tmp_path / ".owner.json.first").write_text(json.dumps({**gone, "token": "second"}))
    assert take_folder(tmp_path) == OWNER.read(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("changed", [None, {"process": ""}])
def test_what_is_left_of_an_owner_and_cannot_be_read_is_named(tmp_path, monkeypatch, changed):
    monkeypatch.setattr(ownership, "_PATIENCE", 0.1)
    (tmp_path / "owner.json").write_text("" if changed is None else json.dumps(record(os.getpid()) | changed))
    message = rf"{re.escape(str(tmp_path))}/owner\.json cannot be read: .*; remove it if no process is at work in"
    with pytest.raises(ValueError, match=message):
        take_folder(tmp_path)


def test_nobody_gives_up_another_s_folder(tmp_path):
    own = take_folder(tmp_path)
    left(tmp_path, {**own, "token": "another"})
    leave_folder(tmp_path, own)
    assert OWNER.read(tmp_path)["token"] == "another"
