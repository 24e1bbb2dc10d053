"""The plan of a run: what it prints, what it writes (nothing), and its arithmetic against numbers counted by hand."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import lightning.pytorch as pl
import pytest

from seedlora.cli import train as cli
from seedlora.distributed.strategies import FSDP2Strategy, Sharding
from seedlora.run import plan
from seedlora.run.cost import PeakMemory
from seedlora.run.ensemble import Ensemble
from seedlora.run.ensemble_options import EnsembleOptions
from seedlora.run.memory import device_memory, memory_of, step_memory
from seedlora.training import building
from tests.helpers.models import make_data, make_module
from tests.helpers.paths import ROOT
from tests.helpers.strategies_job import zero
from train import PARTS

SMALL = ["--data.num_train", "16", "--data.num_val", "4", "--data.num_test", "12", "--data.batch_size", "4"]
# conftest's tiny Llama: per layer q 32 x 32, k and v 16 x 32, o 32 x 32, and 3 x 48 x 32; two layers
LAYER = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 48 * 32
OUTSIDE = 2 * 257 * 32 + 5 * 32  # embedding, head, norms
ADAPTER = 2 * 4 * (64 + 48 + 48 + 64 + 3 * 80)  # r = 4
SIZE = {"tokens": 100, "supervised": 50, "longest": 10}


def test_plan_measures_a_few_steps_and_writes_nothing(tiny_llama, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    happened, load = [], building.load_model
    monkeypatch.setattr(building, "load_model", lambda *a, **o: (happened.append("load"), load(*a, **o))[1])
    forget = PeakMemory.forget
    monkeypatch.setattr(PeakMemory, "forget", lambda self: (happened.append("forget"), forget(self)))
    options = ["--model.base_model", tiny_llama, *SMALL, "--trainer.max_epochs", "6"]
    assert cli.main(PARTS, [*options, "--plan"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for text in ("The run", "each seed 2 epochs of 16 rows, 8 steps of 4 rows", "memory about"):
        assert text in shown
    measured = re.search(
        r"Measured: (\S+) s a step of 3 seeds, so about \d:\d\d:\d\d \(h:mm:ss\) of training; memory (\S+) GiB, where "
        r"the estimate is (\S+) GiB\. Nothing was written\.",
        shown,
    )
    assert measured
    assert float(measured[1]) > 0
    assert not list(tmp_path.iterdir())
    assert happened == ["forget", "load", "forget"], "loading is not measured"


def test_a_run_foretells_its_time_after_four_steps(tiny_llama, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--model.base_model", tiny_llama, *SMALL, "--ensemble.stack_size", "2", "--trainer.max_epochs", "6"]
    assert cli.main(PARTS, options) == 0
    found = re.findall(r"\S+ s a step: about 0:00:\d\d \(h:mm:ss\) to train (.*)", capsys.readouterr().out)
    assert found == ["seed_11, seed_42, 4 steps from here", "seed_202, 4 steps from here"]


@pytest.mark.parametrize(
    ("shared", "base", "adapters", "optimizer"),
    [
        (Sharding(0, 4), OUTSIDE + 2 * LAYER, 8, 8),
        (Sharding(1, 4), OUTSIDE + 2 * LAYER, 8, 12 / 4),
        (Sharding(2, 4), OUTSIDE + 2 * LAYER, 4 + 4 / 4, 12 / 4),
        (Sharding(3, 4), (OUTSIDE + 2 * LAYER) / 4 + OUTSIDE + 2 * LAYER, 4 + 4 / 4, 8 / 4),
    ],
)
def test_each_process_holds_its_part(tiny_llama, shared, base, adapters, optimizer):
    found = step_memory(make_module(tiny_llama).options, 3, **SIZE, shared=shared)
    assert found.base == 4 * base
    assert found.adapters == 3 * ADAPTER * adapters
    assert found.optimizer == 3 * ADAPTER * optimizer


def test_a_head_in_parts_takes_all_logits(tiny_llama):
    whole, parts = (
        step_memory(make_module(tiny_llama).options, 3, **SIZE, shared=Sharding(stage, 2)) for stage in (2, 3)
    )
    assert parts.activations - whole.activations == 50 * 257 * (2 * 4 + 12 - 4 - 8)


@pytest.mark.parametrize(
    ("strategy", "stage"),
    [("auto", 0), ("ddp", 0), (lambda: zero(2), 2), (lambda: zero(3), 3), (FSDP2Strategy, 3)],
)
def test_the_estimate_of_a_run_knows_its_strategy(tiny_llama, strategy, stage):
    model, data = make_module(tiny_llama), make_data()
    data.tokenizer = model.tokenizer
    data.setup("fit")
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1 if strategy == "auto" else 4,
        strategy=strategy() if callable(strategy) else strategy,
        logger=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    rows = data.rows["train"]
    size = {"tokens": 6 * int(rows.lengths.max()), "supervised": int(6 * rows.num_items.mean())}
    expected = step_memory(
        model.options, 3, **size, longest=int(rows.lengths.max()), shared=Sharding(stage, trainer.num_devices)
    )
    assert memory_of(trainer, model.options, data)(3) == expected


def test_the_processes_of_a_machine_share_its_memory():
    silent = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    one, four = pl.Trainer(**silent, devices=1), pl.Trainer(**silent, devices=4, strategy="ddp")
    assert device_memory(four) == device_memory(one) // 4


def test_a_plan_of_several_processes_says_so(tiny_llama):
    model, data, ensemble = make_module(tiny_llama), make_data(), Ensemble(EnsembleOptions((1, 2), budget="full"))
    data.tokenizer = model.tokenizer
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False)
    data.trainer = trainer
    data.setup("fit")
    found = plan.run_plan(trainer, model.options, data, ensemble)
    cells = dict(zip(*(column.cells for column in found.table().columns), strict=True))
    assert " in each of 2 processes: base " in cells["memory"]


@pytest.mark.slow
def test_the_estimate_is_within_a_fifth_of_the_peak(tmp_path):
    """SmolLM2 and two other shapes, each in a process of its own."""
    settings = ("smollm2, 3 x 8 rows of 29", "llama6, 3 x 4 rows of 256", "wide4, 2 x 4 rows of 300")
    script, out = ROOT / "benchmarks" / "memory.py", tmp_path / "out.json"
    for setting in settings:
        subprocess.run([sys.executable, script, "--only", setting, "--out", out], check=True)
        (record,) = json.loads(out.read_text())
        assert 0.8 <= record["ratio"] <= 1.2, record
