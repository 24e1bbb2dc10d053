"""The study: a cell on a tiny model against PEFT's own forward, a second call, and counts of made-up lines."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.study import cells, design, summary, training
from benchmarks.study.design import Cell, Task
from seedlora.records.training import TRAINED

FLOOR = {"epochs": 3, "rate": 1e-2}


class _Small(Task):
    @property
    def data(self):
        return {**super().data, "num_val": 12, "num_test": 12}


@pytest.fixture
def setting(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setitem(design.TASKS, "sums", _Small("chain_sum", design.TASKS["sums"].options, 16))
    monkeypatch.setattr("seedlora.training.model_options.fast_dtype", lambda: torch.float32)  # on every machine
    return training.Setting(tiny_llama, tmp_path)


@pytest.mark.slow
def test_a_cell_scores_all_ways_as_peft_scores_their_folders(setting, tiny_llama):
    cell = Cell("sums", 1.0, (1, 2, 3))
    line = json.loads(json.dumps(cells.run_cell(cell, setting, FLOOR)))
    assert {*design.WAYS} - {"independent"} <= {*line["test"]}
    assert {"long seed, best", "wide batch", "soup of means", "seedlora", "mean seed"} <= {*line["test"]}
    data = training.model_and_data(setting, training.Run("", design.TASKS["sums"], (1,), 1, 1e-2))[1]
    for label, folder in {"soup": "independent/fused", "long seed": "independent/long_seed"}.items():
        base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, setting.work / cell.name / folder).eval()
        total = tokens = 0
        for i in range(12):
            ids, labels = data.rows["test"].padded([i])
            with torch.no_grad():
                said = model(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
            kept = labels[:, 1:] != -100
            total -= float(said.gather(2, ids[:, 1:, None])[..., 0][kept].sum())
            tokens += int(kept.sum())
        assert line["test"][label]["loss"] == pytest.approx(total / tokens, abs=2e-5)
    # All is there: a second call trains nothing and finds the same.
    again = cells.run_cell(cell, setting, FLOOR)
    assert json.loads(json.dumps(again))["test"] == line["test"]
    floors = {"sums": {**FLOOR, "loss": 1.0, "losses": {"0.01": {"3": 1.0}}}}
    summary.show("tiny", [line], floors, summary.Console(quiet=True), setting.work)
    assert "seedlora" in (setting.work / "tiny_tables.md").read_text()


@pytest.mark.slow
def test_a_cell_of_counts_has_soup_and_its_controls_of_each_number(setting):
    cell = Cell("sums", 1 / 3, design.EIGHT, "counts")
    line = cells.run_cell(cell, setting, FLOOR)
    for n in design.COUNTS:
        assert {f"soup of {n}", f"seedlora of {n}", f"long {n}", f"wide {n}"} <= {*line["test"]}
        long, wide = (TRAINED.read(setting.work / cell.name / f"{kind}_{n}") for kind in ("long", "wide"))
        # As many tokens as n seeds: n times the steps, or n rows for one in each step.
        assert [row["steps"] for row in long.values()] == [n * line["steps"]]
        assert [row["steps"] for row in wide.values()] == [line["steps"]] * n


def test_every_cell_is_another_one_and_each_task_has_all_lengths():
    found = design.design(small=True)
    assert len({cell.name for cell in found}) == len(found)
    for task in design.TASKS:
        own = [cell for cell in found if cell.task == task]
        assert sorted(cell.length for cell in own if cell.kind == "ways") == sorted(design.LENGTHS * 3)
        assert [cell.seeds for cell in own if cell.kind == "counts"] == [design.EIGHT]
        assert design.SCOUT not in {seed for cell in own for seed in cell.seeds}


def _line(said: str, low: float, high: float) -> dict[str, object]:
    middle = (low + high) / 2
    vs = {"soup": {"loss": [middle, low, high]}}
    return {"sentence": {"verdict": said}, "test": {"long seed": {"vs": vs}}, "cell": {"task": "sums"}}


def test_the_sentence_is_judged_where_the_truth_is_shown():
    lines = [
        _line("fuse", 0.1, 0.2),  # the long seed's loss is higher, so fusing was right
        _line("fuse", -0.2, -0.1),
        _line("train longer", -0.2, -0.1),
        _line("unknown", -0.2, -0.1),
        _line("fuse", -0.1, 0.1),
    ]
    assert summary.sentence_counts(lines) == {"right": 2, "wrong": 1, "said nothing": 1, "truth not shown": 1}


def test_means_over_cells_are_students():
    found = summary.mean_of([_line("fuse", 0.0, 0.2), _line("fuse", 0.2, 0.4)], "long seed")
    assert (found.value, found.below, found.above, found.n) == (pytest.approx(0.2), 0, 1, 2)
    assert found.high - found.value == pytest.approx(12.706 * 0.1, rel=1e-3)  # t(1) times 0.1414 / sqrt(2)
