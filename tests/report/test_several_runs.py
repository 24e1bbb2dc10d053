"""The page of several runs, and the command that writes it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from seedlora.cli import main as shell
from tests.helpers.report_runs import check_numbers, with_items


def test_the_command_rebuilds_and_compares(stored, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = shutil.copytree(run, tmp_path / "other|<run>")
    for name in ("report.html", "report.md", "report.json"):
        (run / name).unlink()
    results = json.loads((other / "results.json").read_text())
    outcomes = results["items"] | {"fused": results["items"]["fused"].replace("1", "0", 9)}
    results = with_items(results, outcomes)
    (other / "results.json").write_text(json.dumps(results))
    assert shell.main(["report", str(run), str(other)]) == 0
    shown = capsys.readouterr().out
    assert (run / "report.html").read_bytes() == (stored / "report.html").read_bytes()
    assert "better than the mean seed" in " ".join(shown.split())
    assert "report: comparison/report.html" in shown
    found = json.loads(Path("comparison/report.json").read_text())
    assert [row["run"] for row in found["runs"]] == ["a_run", "other|<run>"]
    assert found["runs"][0]["against_mean_seed"]["n"] == 120
    # The same items: nine that only the first has right.
    assert found["verdict"].startswith(
        "other|<run> against a_run, fused adapters on the same 120 items: worse, -7.5 points"
    )
    assert found["verdict"] in shown
    assert all(len(line) <= 80 for line in shown.splitlines() if line.startswith("│"))
    (paired,) = found["paired"]
    assert (paired["run"], paired["against"]) == ("other|<run>", "a_run")
    assert (paired["value"], paired["p_value"]) == pytest.approx((-9 / 120, 2 / 2**9))
    check_numbers(Path("comparison"))
    (other / "results.json").write_text(json.dumps(results | {"items_sha256": "of others"}))
    assert shell.main(["report", str(run), str(other)]) == 0
    found = json.loads(Path("comparison/report.json").read_text())
    assert found["paired"] == []
    assert found["missing"][0].startswith("other|<run> was not tested on the items of a run before it")
    assert "other|&lt;run&gt;" in Path("comparison/report.html").read_text()
    assert "other\\|<run>" in Path("comparison/report.md").read_text()
    assert "\nNo two of these runs were tested on the same items.\n" in Path("comparison/report.md").read_text()
    twin = shutil.copytree(run, tmp_path / "x" / "a_run")
    assert shell.main(["report", str(run), str(twin)]) == 0
    found = json.loads(Path("comparison/report.json").read_text())
    assert [row["run"] for row in found["runs"]] == ["a_run", "x/a_run"]
    assert found["verdict"].startswith(
        "x/a_run against a_run, fused adapters on the same 120 items: no difference shown"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [(["nowhere"], "nowhere holds no run: it has no run.json"), (["a_run", "./a_run"], "a_run is given twice")],
)
def test_folders_that_cannot_be_reported_are_named(words, message, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shell.main(["report", *words]) == 2
    assert message in capsys.readouterr().err
