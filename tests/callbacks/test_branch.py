"""Replicas that are one for a part of the steps: the trunk of ``scheme branch``."""

from __future__ import annotations

import itertools
import json

import lightning.pytorch as pl
import pytest
import torch

from seedlora.callbacks import SeedEnsembleCallback
from seedlora.distributed.strategies import FSDP2Strategy
from tests.helpers.interventions import StopAfter
from tests.helpers.models import SEEDS, make_data, make_module
from tests.helpers.precision import SAME, relative
from tests.helpers.training import OPTIONS, make_trainer, plain_peft_run, saved


def run(base_model, dirpath, *, stop=None, resume=False, dropout=0.0, epochs=1, callbacks=(), **ensemble):
    """Train to the end, accumulating and clipping, or end after a step."""
    options = {"merge": "none", "budget": "full", "dirpath": dirpath, "checkpoint_every_n_steps": 1, "resume": resume}
    callback = SeedEnsembleCallback(SEEDS, **{**options, **ensemble})
    trainer = make_trainer(callback, max_epochs=epochs, limit_val_batches=0, **OPTIONS)
    trainer.callbacks += [*callbacks, *([] if stop is None else [StopAfter(stop)])]
    module = make_module(base_model, lora_dropout=dropout)
    trainer.fit(module, datamodule=make_data(), ckpt_path=callback.ckpt_path, weights_only=True)
    return callback


def same_bits(found, wanted):
    return all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_branch_from_the_first_step_on_is_seeds_from_one_start(tiny_llama, tmp_path, dropout):
    branch = run(tiny_llama, tmp_path / "branch", scheme="branch", trunk=0, dropout=dropout)
    seeds = run(tiny_llama, tmp_path / "seeds", vary="order", dropout=dropout)
    for seed in SEEDS:
        assert same_bits(saved(branch.adapter_path(seed)), saved(seeds.adapter_path(seed)))


@pytest.mark.usefixtures("float64")
def test_a_trunk_to_the_end_is_one_replica_with_the_rows_of_all(tiny_llama, tmp_path):
    trunk = run(tiny_llama, tmp_path, scheme="branch", trunk=1, epochs=2)
    wanted = plain_peft_run(tiny_llama, SEEDS[0], epochs=2, accumulate=2, clip=0.05, rows_of=SEEDS)
    for seed in SEEDS:
        found = saved(trunk.adapter_path(seed))
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert relative(found[key], tensor) < SAME, (seed, key)


class Watch(pl.Callback):
    """Writes down after which steps the replicas are equal, to the bit."""

    def __init__(self):
        self.equal = {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        first, *others = (module.stack.parameters(replica.name) for replica in module.replicas)
        self.equal[trainer.global_step] = all(itertools.chain(*(map(torch.equal, first, other) for other in others)))


def test_the_replicas_are_equal_in_the_trunk_and_part_after_it(tiny_llama, tmp_path):
    watch = Watch()
    run(tiny_llama, tmp_path, scheme="branch", callbacks=[watch])
    assert watch.equal == {0: True, 1: True, 2: True, 3: True, 4: False, 5: False, 6: False}


@pytest.mark.parametrize("stop", [2, 4])
def test_a_resumed_branch_gives_the_bits_of_one_that_was_not_killed(tiny_llama, tmp_path, stop):
    options = {"scheme": "branch", "dropout": 0.1, "ema": 0.9}
    whole = run(tiny_llama, tmp_path / "whole", **options)
    with pytest.raises(TimeoutError):
        run(tiny_llama, tmp_path / "killed", stop=stop, **options)
    resumed = run(tiny_llama, tmp_path / "killed", resume=True, **options)
    for name in (*whole.trained, *(f"{name}_ema" for name in whole.trained)):
        assert same_bits(saved(resumed.adapter_path(name)), saved(whole.adapter_path(name))), name
    settings = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert (settings["ensemble.scheme"], settings["replicas of the scheme"]) == ("branch", list(whole.trained))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "tree"}, "Unknown scheme 'tree'; choose one of independent, branch, local"),
        ({"trunk": 0.5}, "trunk is of scheme branch, and scheme is independent"),
        ({"scheme": "branch", "trunk": 1.5}, "trunk is a part of the steps, from 0 to 1, got 1.5"),
        ({"scheme": "branch", "vary": "init"}, "so their orders must differ: vary='init' does not go with it"),
        ({"scheme": "branch", "sweep": {"r": [4]}}, "replicas that differ in their seeds alone; leave out sweep"),
        ({"ema": 1}, "ema must be between 0 and 1, 0.99 for example, got 1"),
        ({"keep": "best_fused", "merge": "none"}, "watches the fused adapter, and with merge='none' there is none"),
    ],
)
def test_what_does_not_go_with_a_scheme_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        SeedEnsembleCallback((1, 2), **options)


@pytest.mark.parametrize(
    ("ensemble", "message"),
    [
        ({"scheme": "branch", "stack_size": 1}, "scheme='branch' trains all 2 replicas at once, and"),
        ({"keep": "best_fused", "stack_size": 1}, "keep='best_fused' trains all 2 replicas at once"),
    ],
)
def test_what_a_scheme_cannot_do_is_refused_before_training(tiny_llama, tmp_path, ensemble, message):
    callback = SeedEnsembleCallback((1, 2), budget="full", dirpath=tmp_path / "run", **ensemble)
    with pytest.raises(ValueError, match=message):
        make_trainer(callback).fit(make_module(tiny_llama), datamodule=make_data())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("ensemble", "message"),
    [
        ({"scheme": "branch"}, "scheme='branch': that reads and writes the"),
        ({"ema": 0.9, "keep": "best"}, "keep='best' and ema=0.9: that reads"),
    ],
)
def test_a_scheme_needs_whole_adapters(tiny_llama, tmp_path, ensemble, message):
    """A fit would start processes that outlive the test."""
    callback = SeedEnsembleCallback((1, 2), budget="full", dirpath=tmp_path / "run", **ensemble)
    trainer = make_trainer(callback, strategy=FSDP2Strategy(), use_distributed_sampler=False)
    module, data = make_module(tiny_llama), make_data()
    data.tokenizer = module.tokenizer
    data.setup("fit")
    with pytest.raises(ValueError, match=message):
        callback.check_fit(trainer, module, data)
