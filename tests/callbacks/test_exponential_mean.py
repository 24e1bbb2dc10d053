"""The exponential mean of each replica's weights, beside it."""

from __future__ import annotations

import json

import lightning.pytorch as pl
import pytest
import torch

from seedlora.adapters.reading import read_adapter
from seedlora.callbacks import SeedEnsembleCallback
from seedlora.merge.inputs import stack_adapters
from seedlora.merge.layers import merge_stacks
from seedlora.merge.registry import make_rule
from seedlora.training.stack_operations import move_mean
from tests.helpers.models import make_data, make_module
from tests.helpers.precision import SAME, relative
from tests.helpers.training import OPTIONS, make_trainer, saved


class Weights(pl.Callback):
    """The weights of each replica after each optimizer step."""

    def __init__(self):
        self.after = {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step:
            self.after[trainer.global_step] = {
                replica.name: [p.detach().clone() for p in module.stack.parameters(replica.name)]
                for replica in module.replicas
            }


def run(base_model, dirpath, *, merge="none", weights=None, test=False, ensemble=(), **options):
    callback = SeedEnsembleCallback(
        (1, 2), merge=merge, budget="full", dirpath=dirpath, **{"ema": 0.8, **dict(ensemble)}
    )
    module, data = make_module(base_model, **options), make_data()
    trainer = make_trainer(callback, max_epochs=1, **OPTIONS)
    trainer.callbacks += [] if weights is None else [weights]
    trainer.fit(module, datamodule=data)
    if test:
        trainer.test(module, datamodule=data, verbose=False)
    return callback


def sums(tensors):
    """Return what tells tensors apart, whatever their order."""
    return sorted(tensor.double().square().sum().item() for tensor in tensors)


@pytest.mark.usefixtures("float64")
def test_the_mean_is_the_weighted_mean_of_the_weights_after_each_step(tiny_llama, tmp_path):
    weights = Weights()
    callback = run(tiny_llama, tmp_path, weights=weights)
    steps = sorted(weights.after)
    assert steps == [1, 2, 3, 4, 5, 6]
    for name in callback.trained:
        trajectory = [weights.after[step][name] for step in steps]
        shares = torch.tensor([0.8 ** (6 - step) for step in steps])
        shares = shares / shares.sum()
        means = [sum(map(torch.mul, shares, column)) for column in zip(*trajectory, strict=True)]
        assert sums(saved(tmp_path / f"{name}_ema").values()) == pytest.approx(sums(means), abs=SAME)
        assert sums(saved(tmp_path / name).values()) == pytest.approx(sums(trajectory[-1]), abs=SAME)


def test_a_mean_of_equal_weights_is_these_and_of_one_step_the_first():
    weights, mean = [torch.full((3,), 2.0, dtype=torch.float64)], [torch.full((3,), 9.0, dtype=torch.float64)]
    for step in (1, 2, 3):
        move_mean(mean, weights, decay=0.9, step=step)
        assert mean[0].tolist() == pytest.approx([2.0] * 3)


def test_the_mean_is_an_ordinary_adapter_that_is_scored_beside_its_replica(tiny_llama, tmp_path):
    with_means = run(tiny_llama, tmp_path / "with", merge="soup", test=True)
    labels = ["base", "seed_1", "seed_2", "seed_1_ema", "seed_2_ema", "soup", "ema_soup"]
    assert list(with_means.results.scores) == labels
    selection = json.loads((tmp_path / "with" / "selection.json").read_text())
    assert {*labels[1:], "fused"} == selection["scores"].keys()
    assert selection["scores"]["ema_soup"]["loss"] != selection["scores"]["soup"]["loss"]
    # it is a folder as a replica's is, and changes nothing of the replicas
    files = [{path.name for path in (tmp_path / "with" / name).iterdir()} for name in ("seed_1", "seed_1_ema")]
    assert files[0] == files[1]
    plain = SeedEnsembleCallback((1, 2), merge="soup", budget="full", dirpath=tmp_path / "without")
    make_trainer(plain, max_epochs=1, **OPTIONS).fit(make_module(tiny_llama), datamodule=make_data())
    for name in ("seed_1", "seed_2", "fused"):
        found, wanted = saved(tmp_path / "with" / name), saved(tmp_path / "without" / name)
        assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())
    means = {name: read_adapter(tmp_path / "with" / name) for name in ("seed_1_ema", "seed_2_ema")}
    soup = with_means.ensemble.means(torch.device("cpu"))["ema_soup"]()
    for path, factors in merge_stacks(stack_adapters(means), make_rule("soup")).items():
        assert relative(soup[path].dense(), factors.dense()) < 1e-6


@pytest.mark.parametrize("adapter", [{"adapter": "dora"}, {"modules_to_save": ["norm"]}], ids=["dora", "in full"])
def test_all_that_is_trained_has_a_mean(tiny_llama, tmp_path, adapter):
    run(tiny_llama, tmp_path, merge="soup", test=True, **adapter)
    mean, last = saved(tmp_path / "seed_1_ema"), saved(tmp_path / "seed_1")
    assert mean.keys() == last.keys()
    moved = [key for key, tensor in last.items() if not torch.equal(mean[key], tensor)]
    assert any(key.endswith(("magnitude_vector", "norm.weight")) for key in moved)


def test_a_whole_model_has_none(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="ema writes an adapter, and adapter='full' has none"):
        run(tiny_llama, tmp_path, adapter="full", learning_rate=1e-4)


def test_a_part_of_the_run_is_a_decay_by_its_steps(tiny_llama, tmp_path):
    """Half of six steps is a mean over three: each weighs two thirds of the one after it."""
    part = run(tiny_llama, tmp_path / "part", ensemble={"ema": None, "ema_part": 0.5})
    decay = run(tiny_llama, tmp_path / "decay", ensemble={"ema": 1 - 1 / 3})
    for name in ("seed_1_ema", "seed_2_ema"):
        found, wanted = saved(part.dirpath / name), saved(decay.dirpath / name)
        assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())
    # a control that trains twice as long has a mean over twice the steps
    assert part.ensemble.options.ema_decay(12) == 1 - 1 / 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ema": 0.9, "ema_part": 0.1}, "ema is a decay per step, and ema_part sets it; leave out one"),
        ({"ema_part": 1.5}, "ema_part is a part of the steps, 0.1 for example, got 1.5"),
        ({"ema_part": 0.0}, "ema_part is a part of the steps, 0.1 for example, got 0.0"),
    ],
)
def test_what_is_no_mean_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SeedEnsembleCallback((1, 2), **options)


def test_a_part_of_less_than_two_steps_is_refused_before_training(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="ema_part=0.1 of 6 steps is 0.6; a mean must reach back at least 2 steps"):
        run(tiny_llama, tmp_path / "x", ensemble={"ema": None, "ema_part": 0.1})
    assert not (tmp_path / "x").exists()
