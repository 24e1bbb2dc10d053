"""The report of a run in training, kept up to date."""

from __future__ import annotations

import pytest

from seedlora.cli import main as shell
from seedlora.report.page import RELOAD, write_report
from seedlora.report.watching import watch
from seedlora.run.ownership import leave_folder, take_folder


def test_a_report_follows_a_run_and_ends_with_it(run, stored):
    owner, seen = take_folder(run), []
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2]))

    def wait(_seconds):
        seen.append((run / "report.html").read_text())
        if len(seen) == 2:  # nothing was logged before it
            (run / "metrics.jsonl").write_text("".join(lines))
            leave_folder(run, owner)

    watch(run, wait=wait)
    assert seen[0] == seen[1]
    assert seen[0].count(RELOAD) == 1
    # The last one is that of a run that nobody watched.
    assert (run / "report.html").read_bytes() == (stored / "report.html").read_bytes()


def test_who_stops_watching_leaves_a_page_that_stands_still(run, capsys, monkeypatch):
    take_folder(run)

    def stop(_seconds):
        assert RELOAD in (run / "report.html").read_text()
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", stop)
    with pytest.raises(KeyboardInterrupt):
        watch(run, wait=stop)
    assert RELOAD not in (run / "report.html").read_text()


def test_the_command_ends_at_once_where_nobody_is_at_work(run, stored, capsys):
    assert shell.main(["report", "--watch", str(run)]) == 0
    assert "nobody is at work in" in capsys.readouterr().out
    assert (run / "report.html").read_bytes() == (stored / "report.html").read_bytes()
    assert shell.main(["report", "--watch", str(run), str(stored)]) == 2
    assert "--watch takes one run, got 2" in capsys.readouterr().err


def test_what_cannot_be_read_for_a_moment_is_said_and_tried_again(run):
    owner, said = take_folder(run), []
    whole = (run / "cost.json").read_text()
    (run / "cost.json").write_text("{")

    def wait(_seconds):
        (run / "cost.json").write_text(whole)
        leave_folder(run, owner)

    watch(run, say=said.append, wait=wait)
    assert [sentence[:22] for sentence in said] == ["not written this time:"]
    assert write_report(run)["front"]["adapter"] == "fused"
