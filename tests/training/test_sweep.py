"""Replicas that differ in more than their seed: each learns in the stack what it learns alone."""

from __future__ import annotations

import json

import pytest
import torch

from seedlora.adapters.reading import read_adapter
from seedlora.callbacks import SeedEnsembleCallback
from tests.helpers.interventions import StopAfter
from tests.helpers.models import make_data, make_module
from tests.helpers.precision import SAME, relative
from tests.helpers.training import OPTIONS, largest_difference, make_trainer, saved, train

#: One value of each option for each of three seeds: everything that can be swept differs.
OF_EACH = {
    "learning_rate": [1e-3, 4e-3, 2e-3],
    "r": [2, 6, 4],
    "lora_alpha": [4, 6, 12],
    "lora_plus_ratio": [1, 16, 2],
    "weight_decay": [0, 0.1, 0.01],
    "lr_scheduler": ["cosine", "linear", "constant"],
    "warmup_ratio": [0.1, 0.5, 0],
}


def sweep(base_model, dirpath, *, seeds=(1, 2, 3), stop=None, resume=False, stack_size=None, dropout=0.0, **swept):
    """Train a sweep, accumulating, each replica clipped on its own norm; return the callback and the module."""
    callback = SeedEnsembleCallback(
        seeds,
        merge="none",
        budget="full",
        dirpath=dirpath,
        stack_size=stack_size,
        checkpoint_every_n_steps=1,
        resume=resume,
        **swept,
    )
    module, data = make_module(base_model, lora_dropout=dropout), make_data()
    while callback.pending:
        trainer = make_trainer(callback, max_epochs=1, limit_val_batches=0, **OPTIONS)
        trainer.callbacks += [] if stop is None else [StopAfter(stop)]
        trainer.fit(module, datamodule=data, ckpt_path=callback.ckpt_path, weights_only=True)
    return callback, module


def alone(base_model, dirpath, i, dropout=0.0):
    """Train one of the three as a user would who knows of no sweep."""
    options = {option: values[i] for option, values in OF_EACH.items()}
    run = train(base_model, dirpath, [i + 1], lora_dropout=dropout, **options)
    return run.adapter_path(i + 1)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_each_replica_of_a_sweep_equals_its_standalone_run(tiny_llama, tmp_path, dropout):
    run, _ = sweep(tiny_llama, tmp_path / "stack", sweep=OF_EACH, sweep_mode="zip", dropout=dropout)
    assert run.trained[1] == "seed_2_lr0p004_r6_alpha6_plus16_decay0p1_linear_warmup0p5"
    for i, name in enumerate(run.trained):
        found, wanted = (
            read_adapter(run.adapter_path(name)),
            read_adapter(alone(tiny_llama, tmp_path / name, i, dropout)),
        )
        assert largest_difference(found.layers, wanted.layers) < SAME
        config = json.loads((run.adapter_path(name) / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (OF_EACH["r"][i], OF_EACH["lora_alpha"][i])
        assert f"r {OF_EACH['r'][i]}," in (run.adapter_path(name) / "README.md").read_text()


def test_passes_of_one_replica_give_the_bits_of_standalone_runs(tiny_llama, tmp_path):
    run, _ = sweep(tiny_llama, tmp_path / "passes", sweep=OF_EACH, sweep_mode="zip", dropout=0.1, stack_size=1)
    for i, name in enumerate(run.trained):
        wanted = saved(alone(tiny_llama, tmp_path / name, i, 0.1))
        assert all(torch.equal(saved(run.adapter_path(name))[key], tensor) for key, tensor in wanted.items())


def test_a_resumed_sweep_gives_the_bits_of_one_that_was_not_killed(tiny_llama, tmp_path):
    options = {"sweep": OF_EACH, "sweep_mode": "zip", "dropout": 0.1}
    whole, _ = sweep(tiny_llama, tmp_path / "whole", **options)
    with pytest.raises(TimeoutError):
        sweep(tiny_llama, tmp_path / "killed", stop=3, **options)
    resumed, _ = sweep(tiny_llama, tmp_path / "killed", resume=True, **options)
    for name in whole.trained:
        found, wanted = saved(resumed.adapter_path(name)), saved(whole.adapter_path(name))
        assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items()), name


class Sizes:
    """Counts what a fit holds of the replicas, after its last step."""

    def __init__(self, module):
        optimizer = module.trainer.optimizers[0]
        states = (value for state in optimizer.state.values() for value in state.values() if value.numel() > 1)
        self.weights = sum(p.numel() for p in module.parameters() if p.requires_grad)
        self.states = sum(value.numel() for value in states)
        self.base = sum(p.numel() for p in module.parameters() if not p.requires_grad)


def test_a_sweep_holds_what_as_many_seeds_hold(tiny_llama, tmp_path):
    """Four rates are four seeds: one base, as many weights, as many moments, and one forward a step."""
    held = []
    for i, options in enumerate(
        ({"seeds": (1,), "sweep": {"learning_rate": [1e-3, 2e-3, 3e-3, 4e-3]}}, {"seeds": (1, 2, 3, 4)})
    ):
        _, module = sweep(tiny_llama, tmp_path / str(i), **options)
        held.append((vars(Sizes(module)), module.last_forward.tokens))
    assert held[0][0] == held[1][0]
    assert held[0][0]["states"] == 2 * held[0][0]["weights"]
    # the rows of two seeds are padded to the longest of both
    assert held[0][1] <= held[1][1]


def test_a_sweep_is_merged_and_its_greedy_soup_is_scored_beside(tiny_llama, tmp_path):
    callback = SeedEnsembleCallback(
        (1, 2), merge="soup", budget="full", dirpath=tmp_path, sweep={"r": [2, 4]}, controls="none"
    )
    module, data, trainer = make_module(tiny_llama), make_data(), make_trainer(callback, max_epochs=1)
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    names = ["seed_1_r2", "seed_2_r2", "seed_1_r4", "seed_2_r4"]
    assert list(callback.results.scores) == ["base", *names, "soup", "greedy_soup"]
    selection = json.loads((tmp_path / "selection.json").read_text())
    assert {*names, "greedy_soup", "fused", "soup"} == selection["scores"].keys()
    assert selection["best_seed"] in names
    mean = sum(read_adapter(tmp_path / name).layers["model.layers.0.mlp.up_proj"].dense() for name in names) / 4
    fused = read_adapter(callback.fused_path).layers["model.layers.0.mlp.up_proj"].dense()
    assert relative(fused, mean) < 1e-5


@pytest.mark.parametrize(
    ("options", "swept", "message"),
    [
        (
            {"adapter": "pissa"},
            {"r": [2, 4]},
            "sweep r: with adapter='pissa' all replicas start at the sam",
        ),
        (
            {"warmup_steps": 3},
            {"warmup_ratio": [0, 0.1]},
            "sweep warmup_ratio does nothing with warmup_s",
        ),
        ({}, {"learning_rate": [1e-3, -1]}, "for seed_1_lrm1: learning_rate must be positive, got -1.0"),
        (
            {"adapter": "full", "learning_rate": 1e-4},
            {"r": [2]},
            "for seed_1_r2: adapter='full' trains every weight",
        ),
    ],
)
def test_what_replicas_cannot_have_is_refused_before_training(tiny_llama, tmp_path, options, swept, message):
    callback = SeedEnsembleCallback((1, 2), budget="full", dirpath=tmp_path / "run", sweep=swept)
    with pytest.raises(ValueError, match=message):
        make_trainer(callback, max_epochs=1).fit(make_module(tiny_llama, **options), datamodule=make_data())
    assert not (tmp_path / "run").exists()
