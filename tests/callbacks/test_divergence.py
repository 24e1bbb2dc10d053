"""Seeds that diverge: they end the run by name, or are left out and harm no other."""

from __future__ import annotations

import json

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file

from seedlora.adapters.reading import read_adapter
from seedlora.callbacks import SeedEnsembleCallback
from seedlora.training.replicas import StoppedError
from tests.helpers.interventions import Break, Poison, Terminate
from tests.helpers.models import make_data, make_module
from tests.helpers.precision import SAME
from tests.helpers.stopping import Scripted, holds, written
from tests.helpers.training import make_trainer


def test_a_diverged_seed_ends_the_run_by_name(tiny_llama, tmp_path):
    callback = SeedEnsembleCallback([1, 2], budget="full", checkpoint_every_n_steps=2, dirpath=tmp_path / "x")
    run = make_trainer(callback, max_epochs=1)
    run.callbacks.append(Poison("seed_2", 5))
    with pytest.raises(StoppedError, match=r"seed_2: training loss not finite in step 6; lower"):
        run.fit(make_module(tiny_llama), datamodule=make_data())
    assert callback.ensemble.ckpt_step == 4


@pytest.mark.usefixtures("float64")
def test_a_diverged_seed_is_excluded_and_the_others_are_unharmed(tiny_llama, tmp_path):
    alone = SeedEnsembleCallback([1, 3], merge="soup", budget="full", dirpath=tmp_path / "alone")
    make_trainer(alone, max_epochs=1).fit(make_module(tiny_llama), datamodule=make_data())
    callback = SeedEnsembleCallback(
        [1, 2, 3], merge="soup", budget="full", on_divergence="exclude", dirpath=tmp_path / "x"
    )
    run, module, data = make_trainer(callback, max_epochs=1), make_module(tiny_llama), make_data()
    run.callbacks.append(Poison("seed_2", 5))
    run.fit(module, datamodule=data)
    assert callback.trained == ("seed_1", "seed_3")
    assert callback.ensemble.excluded == {"seed_2": "training loss not finite in step 6"}
    trained = json.loads((callback.dirpath / "trained.json").read_text())
    assert {name: row["steps"] for name, row in trained.items()} == dict.fromkeys(("seed_1", "seed_3"), run.global_step)
    assert callback.pending == ()
    assert "val/loss_seed_1" in run.callback_metrics
    for path in (alone.fused_path, *map(alone.adapter_path, (1, 3))):
        wanted = load_file(path / "adapter_model.safetensors")
        found = load_file(callback.dirpath / path.name / "adapter_model.safetensors")
        assert wanted.keys() == found.keys()
        assert all(torch.allclose(found[key], wanted[key], rtol=0, atol=SAME) for key in wanted)
    run.test(module, datamodule=data, verbose=False)
    assert set(callback.results.scores) == {"base", "seed_1", "seed_3", "soup"}


class Finite(list, pl.Callback):
    """Of each validation, whether all its losses are finite."""

    def on_validation_end(self, trainer, module):
        self.append(all(value.isfinite() for value in trainer.callback_metrics.values()))


#: Broken by a step that no training loss follows: just before a validation, and in the last one.
UNSEEN = [(6, {"keep": "best", "patience": 9}, {"val_check_interval": 0.25}), (12, {}, {"limit_val_batches": 0})]


@pytest.mark.parametrize(("step", "options", "run_options"), UNSEEN)
def test_weights_broken_before_any_loss_sees_them_end_the_run(tiny_llama, tmp_path, step, options, run_options):
    callback = SeedEnsembleCallback(
        [1, 2], budget="full", checkpoint_every_n_steps=5, dirpath=tmp_path / "x", **options
    )
    run = make_trainer(callback, max_epochs=1, **run_options)
    run.callbacks.append(Break("seed_2", step))
    message = f"seed_2: weights not finite after step {step}; lower learning_rate, or go on without it by on_div"
    with pytest.raises(StoppedError, match=message):
        run.fit(make_module(tiny_llama), datamodule=make_data())
    assert callback.ensemble.ckpt_step == step // 5 * 5
    assert callback.trained == ()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("step", "options", "run_options"), UNSEEN)
def test_weights_broken_before_any_loss_sees_them_harm_no_other_seed(tiny_llama, tmp_path, step, options, run_options):
    alone = SeedEnsembleCallback([1, 3], merge="soup", budget="full", dirpath=tmp_path / "alone", **options)
    make_trainer(alone, max_epochs=1, **run_options).fit(make_module(tiny_llama), datamodule=make_data())
    callback = SeedEnsembleCallback(
        [1, 2, 3], merge="soup", budget="full", on_divergence="exclude", dirpath=tmp_path / "x", **options
    )
    run, finite = make_trainer(callback, max_epochs=1, **run_options), Finite()
    run.callbacks += [Break("seed_2", step), finite]
    run.fit(make_module(tiny_llama), datamodule=make_data())
    assert all(finite)
    assert callback.ensemble.excluded == {"seed_2": f"weights not finite after step {step}"}
    assert callback.trained == ("seed_1", "seed_3")
    for path in (alone.fused_path, *map(alone.adapter_path, (1, 3))):
        wanted = load_file(path / "adapter_model.safetensors")
        found = load_file(callback.dirpath / path.name / "adapter_model.safetensors")
        assert all(torch.allclose(found[key], wanted[key], rtol=0, atol=SAME) for key in wanted)


def test_no_seed_left_ends_the_run(tiny_llama, tmp_path):
    callback = SeedEnsembleCallback([1], budget="full", on_divergence="exclude", dirpath=tmp_path / "x")
    run = make_trainer(callback, max_epochs=1)
    run.callbacks.append(Poison("seed_1", 2))
    with pytest.raises(StoppedError, match="the training loss of every seed is not finite; lower"):
        run.fit(make_module(tiny_llama), datamodule=make_data())
    assert not (tmp_path / "x" / "excluded.json").exists()


@pytest.mark.usefixtures("float64")
def test_a_diverged_stack_leaves_the_other_stacks_alone(tiny_llama, tmp_path):
    weights = {"weights": [1, 5, 2]}
    options = {"budget": "full", "on_divergence": "exclude", "stack_size": 1, "merge_options": weights}
    options |= {"compare": "seedlora", "compare_options": {"seedlora": weights}}
    callback = SeedEnsembleCallback([1, 2, 3], merge="soup", dirpath=tmp_path / "x", **options)
    module, data = make_module(tiny_llama), make_data()
    for seed in (1, 2, 3):
        run = make_trainer(callback, max_epochs=1)
        if seed == 2:
            run.callbacks.append(Poison("seed_2", 3))
        run.fit(module, datamodule=data)
    assert callback.pending == ()
    assert callback.ensemble.excluded == {"seed_2": "training loss not finite in step 4"}
    assert not (tmp_path / "x" / "checkpoints").exists()
    first, third, fused = (read_adapter(path) for path in (*map(callback.adapter_path, (1, 3)), callback.fused_path))
    for path, factors in fused.layers.items():
        # the weights of the seeds that are left, over their number
        wanted = (first.layers[path].dense() + 2 * third.layers[path].dense()) / 2
        assert torch.allclose(factors.dense(), wanted, rtol=0, atol=SAME)

    # a command that only tests finds what it asks for, and what is compared has the weights of these seeds too
    assert (
        SeedEnsembleCallback([1, 2, 3], merge="soup", dirpath=tmp_path / "x", **options).ensemble.merged_otherwise
        is None
    )
    run.test(module, datamodule=data, verbose=False)
    assert "seedlora" in callback.results.scores


def test_a_stopped_seed_is_written_when_the_last_one_diverges(tiny_llama, tmp_path):
    callback = SeedEnsembleCallback([1, 2], budget="full", patience=1, on_divergence="exclude", dirpath=tmp_path / "x")
    module = Scripted(tiny_llama, dtype="float32", r=4)
    module.losses, module.weights = {"seed_1": [1, 2], "seed_2": [4, 3, 2, 1]}, []
    run = make_trainer(callback, max_epochs=1, val_check_interval=0.25, num_sanity_val_steps=0)
    run.callbacks.append(Poison("seed_2", 7))
    run.fit(module, datamodule=make_data())
    assert callback.trained == ("seed_1",)
    assert callback.ensemble.excluded == {"seed_2": "training loss not finite in step 8"}
    assert holds(written(callback, 1), module.weights[1]["seed_1"])


def test_a_resume_leaves_an_excluded_seed_out(tiny_llama, tmp_path):
    found = {}
    for name, batch in (("whole", None), ("x", 7)):
        options = {"budget": "full", "on_divergence": "exclude", "dirpath": tmp_path / name}
        callback = SeedEnsembleCallback([1, 2, 3], **options)
        run = make_trainer(callback, max_epochs=1)
        run.callbacks.append(Poison("seed_2", 5))
        if batch is None:
            run.fit(make_module(tiny_llama), datamodule=make_data())
        else:
            run.callbacks.append(Terminate(batch))
            with pytest.raises(StoppedError, match="step 8 is saved"):
                run.fit(make_module(tiny_llama), datamodule=make_data())
            callback = SeedEnsembleCallback([1, 2, 3], resume=True, **options)
            checkpoint = callback.ckpt_path
            make_trainer(callback, max_epochs=1).fit(
                make_module(tiny_llama), datamodule=make_data(), ckpt_path=checkpoint, weights_only=True
            )
        assert callback.ensemble.excluded == {"seed_2": "training loss not finite in step 6"}
        files = (tmp_path / name).glob("*/adapter_model.safetensors")
        found[name] = {file.parent.name: file.read_bytes() for file in files}
    assert found["x"].keys() == {"seed_1", "seed_3", "soup", "fused"}
    assert found["x"] == found["whole"]
