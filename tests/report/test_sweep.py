"""What a report says of a sweep."""

from __future__ import annotations

import pytest

from seedlora.records.report import REPORT
from seedlora.report.plots import swept_losses
from seedlora.report.sweep import sweep_table
from tests.helpers.commands import train
from tests.helpers.report_runs import check_numbers


def test_the_losses_of_a_sweep_are_in_the_report_and_on_the_terminal(tiny_llama, tmp_path, capsys):
    options = ["--ensemble.seeds", "[1,2]", "--ensemble.sweep", "{learning_rate: [1e-3, 4e-3], r: [2]}"]
    options += ["--merge", "soup", "--ensemble.budget", "full", "--trainer.max_epochs", "1"]
    assert train(tiny_llama, *options, "--ensemble.dirpath", str(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "1, 2 in one stack: 4 replicas, learning_rate 0.001, 0.004; r 2" in printed
    report = REPORT.read(tmp_path)
    sweep, selection = report["sweep"], report["selection"]
    assert sweep["options"] == ["learning_rate", "r"]
    assert [row["values"] for row in sweep["rows"]] == [{"learning_rate": rate, "r": 2} for rate in (1e-3, 4e-3)]
    for row, rate in zip(sweep["rows"], ("0p001", "0p004"), strict=True):
        losses = [selection["scores"][f"seed_{seed}_lr{rate}_r2"]["loss"] for seed in (1, 2)]
        assert list(row["losses"].values()) == losses
        assert row["mean"] == pytest.approx(sum(losses) / 2)
    assert sweep["best"] == selection["best_seed"]
    assert sweep["sentences"][0] in printed
    table = sweep_table(sweep)
    assert list(table.header) == ["learning_rate", "r", "seed 1", "seed 2", "mean"]
    assert table.rows[1][:2] == ["0.004", "2"]
    assert "What was swept" in (tmp_path / "report.html").read_text()
    check_numbers(tmp_path)


def test_the_figure_of_a_sweep_has_a_line_for_each_seed():
    rows = [{"values": {"r": r}, "losses": {"seed 1": 1.0 / r, "seed 2": 2.0 / r}, "mean": None} for r in (4, 8, 16)]
    drawn = swept_losses("sweep", {"options": ["r"], "rows": rows, "best": None, "sentences": []})
    assert all(text in drawn for text in ("seed 1", "seed 2", ">16<"))
