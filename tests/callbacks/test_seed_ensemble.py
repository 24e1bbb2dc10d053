"""The callback in a Trainer of the user's own, without train.py."""

from __future__ import annotations

import json

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file

from seedlora.adapters.reading import read_adapter
from seedlora.callbacks import SeedEnsembleCallback
from seedlora.merge.inputs import stack_adapters
from seedlora.merge.layers import merge_stacks
from seedlora.merge.methods.soup import soup
from seedlora.merge.registry import METHODS
from seedlora.run.merging import merge_run
from tests.helpers.interventions import StopAfter
from tests.helpers.models import make_data, make_module
from tests.helpers.precision import SAME
from tests.helpers.training import make_trainer


def test_fit_and_test_as_in_the_readme(tiny_llama, tmp_path):
    callback = SeedEnsembleCallback(seeds=[11, 42, 202], merge="seedlora", dirpath=tmp_path / "x")
    module, data = make_module(tiny_llama), make_data()
    run = make_trainer(callback)
    run.fit(module, datamodule=data)
    assert run.current_epoch == 1
    assert (tmp_path / "x" / "fused" / "adapter_model.safetensors").is_file()
    assert {"val/loss_seed_11", "val/loss_fused"} <= set(run.callback_metrics)
    run.test(module, datamodule=data, verbose=False)
    assert callback.results.scores["fused"].n == 12
    assert json.loads((tmp_path / "x" / "results.json").read_text())["metric"] == "exact match, greedy"


def test_a_rule_of_the_user_s_own(tiny_llama, tmp_path):
    callback = SeedEnsembleCallback(seeds=[1, 2], merge=soup, budget="full", dirpath=tmp_path / "x")
    make_trainer(callback, max_epochs=1).fit(make_module(tiny_llama), datamodule=make_data())
    stacks = stack_adapters({str(s): read_adapter(callback.adapter_path(s)) for s in (1, 2)})
    fused = read_adapter(callback.fused_path).layers
    for path, factors in merge_stacks(stacks, METHODS["soup"].rule).items():
        assert torch.equal(fused[path].B, factors.B)


@pytest.mark.parametrize(("options", "epochs", "steps"), [({"max_epochs": 6}, 2, 24), ({"max_steps": 15}, 1, 5)])
def test_the_equal_budget_divides_epochs_or_steps(tiny_llama, tmp_path, options, epochs, steps):
    callback = SeedEnsembleCallback(seeds=[1, 2, 3], dirpath=tmp_path / "x")
    run = make_trainer(callback, **{"max_epochs": -1, **options})
    module = make_module(tiny_llama)
    run.fit(module, datamodule=make_data())
    assert (run.current_epoch, run.global_step, module.fit_settings.total_steps) == (epochs, steps, steps)


def test_live_merges_do_not_disturb_training(tiny_llama, tmp_path):
    updates = []
    for name, limit in (("with", 1.0), ("without", 0)):
        callback = SeedEnsembleCallback(seeds=[1, 2, 3], dirpath=tmp_path / name)
        run = make_trainer(callback, limit_val_batches=limit, val_check_interval=0.25)
        run.fit(make_module(tiny_llama, lora_dropout=0.1), datamodule=make_data())
        updates.append((tmp_path / name / "fused" / "adapter_model.safetensors").read_bytes())
    assert updates[0] == updates[1]


@pytest.mark.usefixtures("float64")
def test_the_validation_loss_of_the_fused_adapter_is_that_of_the_written_one(tiny_llama, tmp_path):
    callback = SeedEnsembleCallback(seeds=[1, 2, 3], dirpath=tmp_path / "x")
    module, data = make_module(tiny_llama), make_data()
    run = make_trainer(callback)
    run.fit(module, datamodule=data)
    shown = run.callback_metrics["val/loss_fused"].item()
    module.stack.load("written", read_adapter(callback.fused_path).layers)
    module.stack.route(["written"])
    ids, labels = data.rows["val"].padded(range(8))
    with torch.no_grad():
        losses, _, keep = module.token_losses(ids, labels)
    assert shown == pytest.approx((losses.sum() / keep.sum()).item(), rel=SAME)


def test_training_lowers_the_loss_and_teaches_the_end_token(tiny_llama, tmp_path):
    callback = SeedEnsembleCallback(seeds=[1, 2], budget="full", dirpath=tmp_path / "x")
    module = make_module(tiny_llama, r=16, learning_rate=1e-2)
    data = make_data(task="gcd", task_options={"max_value": 9}, num_train=32, num_val=0, num_test=0)
    make_trainer(callback, max_epochs=40).fit(module, datamodule=data)
    ids, labels = data.rows["train"].padded(range(32))
    loss, stops = {}, {}
    for name in (None, "seed_1"):
        module.stack.route([name])
        with torch.no_grad():
            losses, right, keep = module.token_losses(ids, labels)
        ends = (labels.roll(-1, 1) == 0) & keep
        loss[name], stops[name] = (losses.sum() / keep.sum()).item(), right[ends].float().mean().item()
    # the frozen random head cannot be confident: its logits are small
    assert loss["seed_1"] < loss[None] - 0.3
    assert stops[None] < 0.05
    assert stops["seed_1"] > 0.95


def test_what_a_killed_run_left_is_removed_if_nothing_is_merged_too(tmp_path):
    callback = SeedEnsembleCallback([1], merge="none", dirpath=tmp_path)
    callback.ensemble.folder.begin(["seed_1"])
    (tmp_path / "seed_1").mkdir()
    (tmp_path / "seed_1" / "adapter_config.json").touch()
    merge_run(callback.ensemble)
    assert [path.name for path in tmp_path.iterdir()] == ["seed_1"]


def test_a_module_used_before_trains_the_same_bits_again(tiny_llama, tmp_path):
    module, data, fused = make_module(tiny_llama, lora_dropout=0.1), make_data(), []
    for name in ("first", "second"):
        callback = SeedEnsembleCallback(seeds=[1, 2, 3], dirpath=tmp_path / name)
        run = make_trainer(callback)
        run.fit(module, datamodule=data)
        run.test(module, datamodule=data, verbose=False)
        fused.append((callback.fused_path / "adapter_model.safetensors").read_bytes())
    assert fused[0] == fused[1]


@pytest.mark.usefixtures("float64")
def test_another_seed_is_trained_alone_and_merged_with_those_there(tiny_llama, tmp_path):
    first = SeedEnsembleCallback([1, 2], budget="full", dirpath=tmp_path / "x")
    make_trainer(first, max_epochs=1).fit(make_module(tiny_llama), datamodule=make_data())
    times = {s: (first.adapter_path(s) / "adapter_model.safetensors").stat().st_mtime_ns for s in (1, 2)}
    more = SeedEnsembleCallback([1, 2, 3], budget="full", dirpath=tmp_path / "x", resume=True)
    run = make_trainer(more, max_epochs=1)
    module = make_module(tiny_llama)
    run.fit(module, datamodule=make_data())
    assert [replica.name for replica in module.replicas] == ["seed_3"]
    assert {s: (first.adapter_path(s) / "adapter_model.safetensors").stat().st_mtime_ns for s in (1, 2)} == times
    record = json.loads((more.fused_path / "fusion.json").read_text())
    assert [item["name"] for item in record["inputs"]] == ["seed_1", "seed_2", "seed_3"]
    together = SeedEnsembleCallback([1, 2, 3], budget="full", dirpath=tmp_path / "all")
    make_trainer(together, max_epochs=1).fit(make_module(tiny_llama), datamodule=make_data())
    wanted, found = (load_file(c.fused_path / "adapter_model.safetensors") for c in (together, more))
    assert all(torch.allclose(found[key], wanted[key], rtol=0, atol=SAME) for key in wanted)


@pytest.mark.parametrize("n", [1, 16])
def test_one_seed_and_sixteen_make_a_run(tiny_llama, tmp_path, n):
    callback = SeedEnsembleCallback(range(n), budget="full", dirpath=tmp_path / "x")
    run, module, data = make_trainer(callback, max_steps=2), make_module(tiny_llama), make_data()
    run.fit(module, datamodule=data)
    run.test(module, datamodule=data, verbose=False)
    assert len(callback.trained) == n
    assert callback.results.scores["fused"].n == 12


def test_a_folder_is_owned_while_a_trainer_is_at_work_in_it(tiny_llama, tmp_path):
    callback = SeedEnsembleCallback([1, 2], budget="full", dirpath=tmp_path / "x", merge="soup")
    again = SeedEnsembleCallback([1, 2], budget="full", dirpath=tmp_path / "x", merge="soup", resume=True)

    class Other(pl.Callback):
        def on_train_start(self, trainer, module):
            with pytest.raises(ValueError, match="is in use: .* this very process, by another callback"):
                make_trainer(again, max_steps=2).fit(make_module(tiny_llama), datamodule=make_data())

    module, data = make_module(tiny_llama), make_data()
    with pytest.raises(TimeoutError):
        run = make_trainer(callback, max_steps=2)
        run.callbacks += [Other(), StopAfter(1)]
        run.fit(module, datamodule=data)
    assert not (tmp_path / "x" / "owner.json").exists()
    run = make_trainer(again, max_steps=2)
    run.fit(module, datamodule=data)
    run.test(module, datamodule=data, verbose=False)
    assert not (tmp_path / "x" / "owner.json").exists()
