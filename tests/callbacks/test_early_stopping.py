"""Seeds that stop before the others because they improve no more, and keep their best weights."""

from __future__ import annotations

import json

import pytest
import torch

from seedlora.callbacks import SeedEnsembleCallback
from seedlora.training.replicas import StoppedError
from tests.helpers.interventions import Terminate
from tests.helpers.models import make_data
from tests.helpers.precision import SAME
from tests.helpers.stopping import Scripted, fit_scripted, holds, written
from tests.helpers.training import make_trainer


def test_each_seed_keeps_its_own_best_weights(tiny_llama, tmp_path):
    callback = SeedEnsembleCallback([1, 2, 3], budget="full", keep="best", dirpath=tmp_path / "x")
    losses = {"seed_1": [3, 1, 2, 4], "seed_2": [4, 3, 2, 1], "seed_3": [1, 2, 3, float("nan")]}
    module, _ = fit_scripted(tiny_llama, callback, losses, max_epochs=1)
    assert len(module.weights) == 4
    for seed, best in ((1, 1), (2, 3), (3, 0)):
        assert holds(written(callback, seed), module.weights[best][f"seed_{seed}"])
        assert not holds(written(callback, seed), module.weights[(best + 1) % 4][f"seed_{seed}"])


def test_all_seeds_keep_their_weights_of_the_fused_adapters_best_validation(tiny_llama, tmp_path):
    callback = SeedEnsembleCallback([1, 2], budget="full", keep="best_fused", dirpath=tmp_path / "x")
    losses = {"fused": [3, 1, 2, 4], "seed_1": [4, 3, 2, 1], "seed_2": [1, 2, 3, 4]}
    module, _ = fit_scripted(tiny_llama, callback, losses, max_epochs=1)
    for seed in (1, 2):
        assert holds(written(callback, seed), module.weights[1][f"seed_{seed}"])
    trained = json.loads((callback.dirpath / "trained.json").read_text())
    assert [row["kept_step"] for row in trained.values()] == [6, 6]


def test_patience_with_the_fused_adapters_loss_stops_all_seeds_at_once(tiny_llama, tmp_path):
    # until a method is chosen soup stands for it
    callback = SeedEnsembleCallback(
        [1, 2], budget="full", keep="best_fused", patience=1, merge="greedy_soup", dirpath=tmp_path / "x"
    )
    module, run = fit_scripted(tiny_llama, callback, {"soup": [2, 1, 3, 0], "seed_1": [1], "seed_2": [1]}, max_epochs=1)
    assert run.global_step == 9
    assert holds(written(callback, 2), module.weights[1]["seed_2"])


@pytest.mark.usefixtures("float64")
def test_a_seed_without_patience_left_is_stopped_and_the_others_train_as_before(tiny_llama, tmp_path):
    plain = SeedEnsembleCallback([1, 2], budget="full", dirpath=tmp_path / "plain")
    fit_scripted(tiny_llama, plain, {}, max_epochs=1)
    callback = SeedEnsembleCallback([1, 2], budget="full", patience=1, dirpath=tmp_path / "x")
    module, run = fit_scripted(tiny_llama, callback, {"seed_1": [1, 2], "seed_2": [4, 3, 2, 1]}, max_epochs=1)
    assert module.replicas.idle == {"seed_1"}
    assert holds(written(callback, 1), module.weights[1]["seed_1"])
    trained = json.loads((callback.dirpath / "trained.json").read_text())
    assert {name: (row["steps"], row["stopped"]) for name, row in trained.items()} == {
        "seed_1": (6, True),
        "seed_2": (12, False),
    }
    lengths, sampler = run.datamodule.rows["train"].lengths, run.datamodule.train_dataloader().sampler
    sampler.set_epoch(0)
    for seed, steps in ((1, 6), (2, 12)):
        saw = sum(int(lengths[sampler.order(seed, step)].sum()) for step in range(steps))
        assert trained[f"seed_{seed}"]["tokens"] == saw
    assert all(map(torch.equal, module.weights[1]["seed_1"], module.weights[3]["seed_1"]))
    assert run.global_step == 12
    for key, value in written(plain, 2).items():
        assert torch.allclose(written(callback, 2)[key], value, rtol=0, atol=SAME)


def test_a_seed_stopped_within_an_optimizer_step_moves_no_more(tiny_llama, tmp_path):
    callback = SeedEnsembleCallback([1, 2], budget="full", patience=1, keep="best", dirpath=tmp_path / "x")
    # validations after 3, 6, 9 and 12 batches, steps of 4: at the second one two batches are accumulated
    losses = {"seed_1": [1, 2], "seed_2": [4, 3, 2, 1]}
    module, run = fit_scripted(tiny_llama, callback, losses, max_epochs=1, accumulate_grad_batches=4)
    assert module.replicas.idle == {"seed_1"}
    assert run.global_step == 3
    assert holds(written(callback, 1), module.weights[0]["seed_1"])
    assert holds(written(callback, 2), module.weights[3]["seed_2"])
    trained = json.loads((callback.dirpath / "trained.json").read_text())
    assert [row["kept_step"] for row in trained.values()] == [0, 3]


def test_the_fit_ends_when_all_seeds_are_stopped(tiny_llama, tmp_path):
    callback = SeedEnsembleCallback([1, 2], budget="full", patience=2, keep="best", dirpath=tmp_path / "x")
    module, run = fit_scripted(tiny_llama, callback, {"seed_1": [1], "seed_2": [1]})
    assert len(module.weights) == 3
    assert run.global_step == 9
    assert holds(written(callback, 1), module.weights[0]["seed_1"])
    assert callback.fused_path.is_dir()


def test_a_first_validation_loss_that_is_no_number_is_not_the_best_for_ever(tiny_llama, tmp_path):
    callback = SeedEnsembleCallback([1, 2], budget="full", keep="best", dirpath=tmp_path / "x")
    losses = {"seed_1": [float("nan"), 3, 1, 2], "seed_2": [float("nan")]}
    module, _ = fit_scripted(tiny_llama, callback, losses, max_epochs=1)
    assert holds(written(callback, 1), module.weights[2]["seed_1"])


def test_a_resume_leaves_a_seed_stopped_that_had_no_patience_left(tiny_llama, tmp_path):
    options = {"max_epochs": 1}
    whole = SeedEnsembleCallback([1, 2], budget="full", patience=1, keep="best", dirpath=tmp_path / "whole")
    fit_scripted(tiny_llama, whole, {"seed_1": [1, 2], "seed_2": [4, 3, 2, 1]}, **options)
    first = SeedEnsembleCallback([1, 2], budget="full", patience=1, keep="best", dirpath=tmp_path / "x")
    module = Scripted(tiny_llama, dtype="float32", r=4)
    module.losses, module.weights = {"seed_1": [1, 2], "seed_2": [4, 3]}, []
    run = make_trainer(first, val_check_interval=0.25, num_sanity_val_steps=0, **options)
    run.callbacks.append(Terminate(7))  # validations after 3, 6, 9 and 12
    with pytest.raises(StoppedError, match="step 8 is saved"):
        run.fit(module, datamodule=make_data())
    assert module.replicas.idle == {"seed_1"}
    again = SeedEnsembleCallback([1, 2], budget="full", patience=1, keep="best", dirpath=tmp_path / "x", resume=True)
    module = Scripted(tiny_llama, dtype="float32", r=4)
    module.losses, module.weights = {"seed_1": [0], "seed_2": [2, 1]}, []  # better than ever, and not looked at
    run = make_trainer(again, val_check_interval=0.25, num_sanity_val_steps=0, **options)
    run.fit(module, datamodule=make_data(), ckpt_path=again.ckpt_path, weights_only=True)
    assert module.replicas.idle == {"seed_1"}
    assert len(module.weights) == 2
    for name in ("seed_1", "seed_2", "fused"):
        file = "adapter_model.safetensors"
        assert (tmp_path / "x" / name / file).read_bytes() == (tmp_path / "whole" / name / file).read_bytes()


@pytest.mark.parametrize(("stop", "seen"), [(4, 1), (6, 2), (8, 2)])
def test_a_resume_keeps_the_fused_adapters_best_step_to_the_bit(tiny_llama, tmp_path, stop, seen):
    """Killed before, at and after the best validation, whose weights are in the checkpoint from then on."""
    losses = {"fused": [3, 1, 2, 4], "seed_1": [4, 3, 2, 1], "seed_2": [1, 2, 3, 4]}

    def fit(name, losses, *, resume=False, callbacks=()):
        callback = SeedEnsembleCallback(
            [1, 2], budget="full", keep="best_fused", dirpath=tmp_path / name, resume=resume, ema=0.8
        )
        module = Scripted(tiny_llama, dtype="float32", r=4)
        module.losses, module.weights = losses, []
        run = make_trainer(callback, max_epochs=1, val_check_interval=0.25, num_sanity_val_steps=0)
        run.callbacks += callbacks
        run.fit(module, datamodule=make_data(), ckpt_path=callback.ckpt_path, weights_only=True)
        return callback

    whole = fit("whole", losses)
    with pytest.raises(StoppedError, match=f"step {stop} is saved"):
        fit("killed", losses, callbacks=[Terminate(stop - 1)])  # validations after 3, 6, 9 and 12
    resumed = fit("killed", {label: values[seen:] for label, values in losses.items()}, resume=True)
    trained = [json.loads((run.dirpath / "trained.json").read_text()) for run in (resumed, whole)]
    assert trained[0] == trained[1]
    assert [row["kept_step"] for row in trained[0].values()] == [6, 6]
    for name in ("seed_1", "seed_2", "seed_1_ema", "fused"):
        file = "adapter_model.safetensors"
        assert (resumed.dirpath / name / file).read_bytes() == (whole.dirpath / name / file).read_bytes()
