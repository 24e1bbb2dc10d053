"""The plan of a run: what it prints, and what it writes, which is nothing."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import lightning.pytorch as pl

from seedlora.datamodules import InstructionData
from seedlora.run import memory, plan, plan_advice
from seedlora.run.cost import PeakMemory
from seedlora.run.ensemble import Ensemble
from seedlora.run.ensemble_options import EnsembleOptions
from seedlora.run.memory import PART_USED, memory_of
from seedlora.training import building
from tests.helpers.commands import train
from tests.helpers.models import make_data, make_module


def test_plan_measures_a_few_steps_and_writes_nothing(tiny_llama, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    happened, load = [], building.load_model
    monkeypatch.setattr(building, "load_model", lambda *a, **o: (happened.append("load"), load(*a, **o))[1])
    forget = PeakMemory.forget
    monkeypatch.setattr(PeakMemory, "forget", lambda self: (happened.append("forget"), forget(self)))
    assert train(tiny_llama, "--trainer.max_epochs", "6", "--plan") == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for text in ("The run", "each seed 2 epochs of 16 rows, 8 steps of 4 rows", "memory about"):
        assert text in shown
    measured = re.search(
        r"Measured: (\S+) s a step of 3 seeds, so about \d:\d\d:\d\d \(h:mm:ss\) of training; memory (\S+) GiB, where "
        r"the estimate is (\S+) GiB for the largest forward to come\. Nothing was written\.",
        shown,
    )
    assert measured
    assert float(measured[1]) > 0
    assert not list(tmp_path.iterdir())
    assert happened == ["forget", "load", "forget"], "loading is not measured"


def test_a_run_foretells_its_time_after_four_steps(tiny_llama, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train(tiny_llama, "--ensemble.stack_size", "2", "--trainer.max_epochs", "6") == 0
    found = re.findall(r"\S+ s a step: about 0:00:\d\d \(h:mm:ss\) to train (.*)", capsys.readouterr().out)
    assert found == ["seed_11, seed_42, 4 steps from here", "seed_202, 4 steps from here"]


def test_a_plan_of_several_processes_says_so(tiny_llama):
    model, data, ensemble = make_module(tiny_llama), make_data(), Ensemble(EnsembleOptions((1, 2), budget="full"))
    data.tokenizer = model.tokenizer
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False)
    data.trainer = trainer
    data.setup("fit")
    found = plan.run_plan(trainer, model.options, data, ensemble)
    cells = dict(zip(*(column.cells for column in found.table().columns), strict=True))
    assert " in each of 2 processes: base " in cells["memory"]


def test_a_plan_ends_when_its_time_is_over(tiny_llama, tmp_path, monkeypatch, capsys):
    """One micro-batch is measured, whatever the limit."""
    monkeypatch.chdir(tmp_path)
    assert train(tiny_llama, "--trainer.max_epochs", "6", "--trainer.accumulate_grad_batches", "2", "--plan=0") == 0
    assert "; measured on 1 of 2 micro-batches. Nothing" in " ".join(capsys.readouterr().out.split())


def test_a_plan_names_the_option_that_makes_a_run_fit(tiny_llama, monkeypatch):
    # What a CPU's allocator holds is more than so small a model, and recomputing saves nothing there.
    monkeypatch.setattr(memory, "CPU_HOLES", dict.fromkeys(memory.CPU_HOLES, 1.0))
    model, data, ensemble = make_module(tiny_llama), make_data(), Ensemble(EnsembleOptions((1, 2), budget="full"))
    data.tokenizer = model.tokenizer
    data.setup("fit")
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False)

    def needed(which, size):
        changed = replace(model.options, gradient_checkpointing=which)
        return memory_of(trainer, changed, data, ensemble.replicas)(size).total

    expected = {
        needed("none", 2): None,
        needed("selective", 2): "gradient_checkpointing='selective' would take",
        needed("full", 2): "gradient_checkpointing='full' would take",
        needed("full", 1): "gradient_checkpointing='full' and stack_size=1 would take",
        1: "no recomputation or smaller stack is enough",
    }
    for available, words in expected.items():
        monkeypatch.setattr(plan_advice, "device_memory", lambda _, size=available: size / PART_USED + 1)
        found = plan_advice.plan_advice(trainer, model.options, data, ensemble)
        found = [sentence for sentence in found if sentence.startswith("the estimate")]
        assert (words is None and not found) or words in found[0]


def test_a_plan_counts_rows_that_are_trained_on_as_well(tiny_llama, tmp_path):
    texts = [f"{i % 30}+{i % 30}=" for i in range(40)]
    rows = "".join(json.dumps({"prompt": text, "response": "x"}) + "\n" for text in texts)
    (tmp_path / "rows.jsonl").write_text(rows)
    data = InstructionData(str(tmp_path / "rows.jsonl"), style="plain", val_fraction=0.2, test_fraction=0.2)
    data.tokenizer = make_module(tiny_llama).tokenizer
    data.setup("fit")
    trained = {texts[number] for number in data.rows["train"].numbers}
    seen = {split: sum(texts[number] in trained for number in data.rows[split].numbers) for split in ("val", "test")}
    assert data.seen_in_training() == {split: count for split, count in seen.items() if count} != {}
    parts = " and ".join(f"{count} of 8 {split} rows" for split, count in seen.items() if count)
    assert f"; {parts} occur word for word among the training rows" in plan._rows(data)
