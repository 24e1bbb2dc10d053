"""Replicas that are averaged from time to time: ``scheme local``."""

from __future__ import annotations

import json

import lightning.pytorch as pl
import pytest
import torch

from seedlora.callbacks import JSONLinesLogger, SeedEnsembleCallback
from seedlora.names import OUTER_SEED
from tests.helpers.interventions import Break, StopAfter
from tests.helpers.models import SEEDS, make_data, make_module
from tests.helpers.precision import SAME, relative
from tests.helpers.training import OPTIONS, SILENT, make_trainer, saved


def run(base_model, dirpath, *, stop=None, resume=False, callbacks=(), logger=False, **ensemble):
    """Train to the end in steps of two micro-batches, six of them, or end after one; return the callback."""
    options = {"merge": "none", "budget": "full", "dirpath": dirpath, "checkpoint_every_n_steps": 1, "resume": resume}
    callback = SeedEnsembleCallback(SEEDS, **{**options, **ensemble})
    trainer = make_trainer(callback, max_epochs=1, limit_val_batches=0, logger=logger, log_every_n_steps=1, **OPTIONS)
    trainer.callbacks += [*callbacks, *([] if stop is None else [StopAfter(stop)])]
    module = make_module(base_model, lora_dropout=0.1)
    trainer.fit(module, datamodule=make_data(), ckpt_path=callback.ckpt_path, weights_only=True)
    return callback


def same_bits(found, wanted):
    return all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


class Weights(pl.Callback):
    """The weights of each replica after each step: as AdamW made them, and as they were left."""

    def __init__(self):
        self.made, self.left = {}, {}

    def on_before_zero_grad(self, trainer, module, optimizer):
        self.made[trainer.global_step] = self.copies(module)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.left[trainer.global_step] = self.copies(module)

    @staticmethod
    def copies(module):
        return [[p.detach().clone() for p in module.stack.parameters(replica.name)] for replica in module.replicas]


def equal(replicas):
    return all(torch.equal(a, b) for other in replicas[1:] for a, b in zip(replicas[0], other, strict=True))


def test_replicas_are_equal_after_an_average_and_part_in_the_steps_after_it(tiny_llama, tmp_path):
    weights = Weights()
    run(tiny_llama, tmp_path, scheme="local", average_every=2, callbacks=[weights])
    assert {step: equal(each) for step, each in weights.left.items() if step} == {
        **dict.fromkeys((1, 3, 5, 6), False),
        **dict.fromkeys((2, 4), True),
    }


def test_without_an_average_they_are_seeds_from_one_start(tiny_llama, tmp_path):
    local = run(tiny_llama, tmp_path / "local", scheme="local", average_every=6)
    seeds = run(tiny_llama, tmp_path / "seeds", vary="order")
    for seed in SEEDS:
        assert same_bits(saved(local.adapter_path(seed)), saved(seeds.adapter_path(seed)))


@pytest.mark.usefixtures("float64")
def test_the_mean_is_of_the_weights_that_the_replicas_had_reached(tiny_llama, tmp_path):
    free, averaged = Weights(), Weights()
    run(tiny_llama, tmp_path / "free", vary="order", callbacks=[free])
    run(tiny_llama, tmp_path / "local", scheme="local", average_every=2, callbacks=[averaged])
    # until the first average they are the same, and then the mean of those that go on freely
    for i, found in enumerate(averaged.left[2][0]):
        wanted = torch.stack([replica[i] for replica in free.left[2]]).mean(0)
        assert relative(found, wanted) < SAME


def test_the_error_of_averaging_factors_is_logged(tiny_llama, tmp_path):
    logger = JSONLinesLogger(tmp_path / "metrics.jsonl")
    run(tiny_llama, tmp_path / "run", scheme="local", average_every=2, logger=logger)
    lines = [json.loads(line) for line in logger.path.read_text().splitlines()]
    errors = [line["averaging/error"] for line in lines if "averaging/error" in line]
    assert len(errors) == 2
    assert all(0 < error < 1 for error in errors)


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_run_gives_the_bits_of_one_that_was_not_killed(tiny_llama, tmp_path, stop):
    options = {"scheme": "local", "average_every": 2, "outer_learning_rate": 0.7}
    whole = run(tiny_llama, tmp_path / "whole", **options)
    with pytest.raises(TimeoutError):
        run(tiny_llama, tmp_path / "killed", stop=stop, **options)
    resumed = run(tiny_llama, tmp_path / "killed", resume=True, **options)
    for seed in SEEDS:
        assert same_bits(saved(resumed.adapter_path(seed)), saved(whole.adapter_path(seed)))


def test_an_outer_step_goes_elsewhere_than_the_mean(tiny_llama, tmp_path):
    plain, outer = (
        run(tiny_llama, tmp_path / str(rate), scheme="local", average_every=2, outer_learning_rate=rate)
        for rate in (None, 0.7)
    )
    found, wanted = saved(outer.adapter_path(SEEDS[0])), saved(plain.adapter_path(SEEDS[0]))
    assert not same_bits(found, wanted)


def test_a_replica_that_is_not_finite_is_left_out_before_it_spoils_the_mean(tiny_llama, tmp_path):
    class BreakFirst(Break):
        """Before the ensemble looks."""

        def on_before_zero_grad(self, trainer, module, optimizer):
            if trainer.global_step == 2 and "seed_42" not in module.replicas.left_out:
                self.interfere(module)

    broken = BreakFirst("seed_42", step=-1)
    found = run(tiny_llama, tmp_path, scheme="local", average_every=2, on_divergence="exclude", callbacks=[broken])
    assert found.trained == ("seed_11", "seed_202")
    assert list(found.ensemble.excluded) == ["seed_42"]


def test_one_seed_with_the_outer_step_is_a_control(tiny_llama, tmp_path):
    options = {"scheme": "local", "average_every": 2, "outer_learning_rate": 0.7, "controls": "equal_tokens"}
    callback = SeedEnsembleCallback((1, 2), merge="soup", budget="full", dirpath=tmp_path, **options)
    module, data = make_module(tiny_llama), make_data()
    trained = []
    while callback.pending or callback.pending_controls:
        trained += callback.ensemble.next_names[:1]
        limits = {"max_epochs": 1, **callback.ensemble.control_limits(max_epochs=1, max_steps=-1)}
        run = pl.Trainer(callbacks=[callback], accelerator="cpu", **limits, **SILENT, **OPTIONS)
        run.fit(module, datamodule=data)
    assert trained == ["seed_1", "long_seed", "wide_batch_x1", "wide_batch_xroot", "wide_batch_xn", OUTER_SEED]
    steps = {name: row["steps"] for name, row in json.loads((tmp_path / "trained.json").read_text()).items()}
    assert steps[OUTER_SEED] == steps["long_seed"] == 2 * steps["seed_1"]
    assert not same_bits(saved(tmp_path / OUTER_SEED), saved(tmp_path / "long_seed"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"average_every": 5}, "average_every is of scheme local, and scheme is independent"),
        ({"scheme": "branch", "outer_learning_rate": 0.7}, "outer_learning_rate is of scheme local, and sch"),
        ({"scheme": "local", "average_every": 0}, "average_every must be positive, got 0"),
        ({"scheme": "local", "trunk": 0.5}, "trunk is of scheme branch, and scheme is local"),
        ({"scheme": "local", "vary": "init"}, "scheme='local' starts all replicas at the same weights, so"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        SeedEnsembleCallback((1, 2), **options)
