"""The options of Lightning's Trainer: each is in the table, on its page, and does what both say."""

from __future__ import annotations

import inspect
import json
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
)

from seedlora.callbacks import SeedEnsembleCallback
from seedlora.report.page import write_report
from seedlora.run.trainer_options import MEANING, PASSED, REFUSED, TRAINER_OPTIONS
from seedlora.training.replicas import StoppedError
from tests.helpers.models import make_data, make_module
from tests.helpers.training import make_trainer


def test_every_option_of_the_trainer_is_in_the_table():
    named = [name for name in inspect.signature(pl.Trainer.__init__).parameters if name != "self"]
    assert list(TRAINER_OPTIONS) == named
    assert {option.how for option in TRAINER_OPTIONS.values()} == {PASSED, MEANING, REFUSED}
    assert all(option.says for option in TRAINER_OPTIONS.values() if option.how != PASSED)


#: One epoch of each seed has six batches, of two rows of 24 for each; there are eight validation rows in two batches.
REFUSALS = {
    "max_epochs 0": ({"max_epochs": 0}, "max_epochs=0 leaves nothing to train; give at least 1"),
    "max_steps 0": ({"max_steps": 0}, "max_steps=0 leaves nothing to train; give at least 1"),
    "no batches": ({"limit_train_batches": 0}, "limit_train_batches=0 leaves none of the 12 training batches"),
    "part of a batch": (
        {"limit_train_batches": 0.05},
        "limit_train_batches=0.05 leaves none of the 12 training",
    ),
    "part of a validation": (
        {"limit_val_batches": 0.1},
        "limit_val_batches=0.1 leaves none of the 2 validation",
    ),
    "min_epochs": ({"min_epochs": 3}, "min_epochs=3 is more than a seed is trained, which is 1; leave it out"),
    "min_steps": (
        {"min_steps": 13},
        "min_steps=13 is more than a seed is trained, which is 12 steps; leave it",
    ),
    "overfit_batches": (
        {"overfit_batches": 2},
        "overfit_batches would replace the order in which rows are dealt",
    ),
    "val_check_interval": (
        {"val_check_interval": 1000},
        "val_check_interval=1000 is more than the 12 batches of an epoch; take a number up to that",
    ),
    "no interval": ({"val_check_interval": 0}, "val_check_interval=0 is no interval; .* switches validation off"),
    "no epochs between": ({"check_val_every_n_epoch": 0}, "check_val_every_n_epoch=0: give at least 1"),
    "no batch in a step": ({"accumulate_grad_batches": 0}, "accumulate_grad_batches=0 leaves no batch for a step"),
    "gradients turned round": ({"gradient_clip_val": -1}, "gradient_clip_val=-1 would turn every gradient round"),
    **{
        type(callback).__name__: ({"callbacks": callback}, f"{type(callback).__name__} changes .*; {instead}")
        for callback, instead in (
            (GradientAccumulationScheduler({0: 2}), "set accumulate_grad_batches"),
            (BatchSizeFinder(), "set batch_size"),
            (LearningRateFinder(), "sweep tries"),
            (StochasticWeightAveraging(0.1), "ema averages"),
            (EMAWeightAveraging(), "ema averages"),
            (ModelPruning("l1_unstructured"), "merge methods such as dare"),
            (BackboneFinetuning(), "target_modules and"),
        )
    },
    "monitor": (
        {"callbacks": EarlyStopping("val/loss_nothing")},
        "EarlyStopping watches 'val/loss_nothing', which is not logged; choose one of train/loss_seed_1, train/",
    ),
    "monitor without validation": (
        {"callbacks": EarlyStopping("val/loss_fused"), "limit_val_batches": 0},
        "EarlyStopping watches 'val/loss_fused', which is not logged; .*; there are no validation batches",
    ),
}


@pytest.mark.parametrize(("options", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_is_refused_by_name(tiny_llama, tmp_path, options, reason):
    callback = SeedEnsembleCallback([1, 2], budget="full", dirpath=tmp_path / "x")
    options = dict(options)
    more = options.pop("callbacks", None)
    run = make_trainer(callback, **{"max_epochs": 1, **options})
    run.callbacks += [] if more is None else [more]
    with pytest.raises(ValueError, match=reason):
        run.fit(make_module(tiny_llama), datamodule=make_data())
    assert not (tmp_path / "x").exists()


class Ending(pl.Callback):
    """Ends a fit after a step, by itself or by letting its time pass."""

    def __init__(self, step, seconds=None):
        self.step, self.seconds = step, seconds

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step - 1 and self.seconds is not None:
            time.sleep(self.seconds)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.should_stop or (self.seconds is None and trainer.global_step == self.step)


@pytest.mark.parametrize(
    ("ending", "options", "reason"),
    [
        (Ending(5), {}, "a callback that stopped the Trainer"),
        (Ending(5, 10), {"max_time": {"seconds": 10}}, "trainer.max_time"),
        (EarlyStopping("train/loss_seed_1", divergence_threshold=0.0), {}, "EarlyStopping on train/loss_seed_1"),
    ],
    ids=["callback", "time", "EarlyStopping"],
)
def test_what_ends_early_is_said_to_be_unfinished_wherever_it_is_told(
    tiny_llama, tmp_path, capsys, ending, options, reason
):
    callback = SeedEnsembleCallback([1, 2], budget="full", dirpath=tmp_path / "x", merge="soup")
    run, module, data = make_trainer(callback, max_epochs=3, **options), make_module(tiny_llama), make_data()
    run.callbacks.append(ending)
    run.fit(module, datamodule=data)
    run.test(module, datamodule=data, verbose=False)
    trained = json.loads((callback.dirpath / "trained.json").read_text())
    steps = trained["seed_1"]["steps"]
    assert (trained["seed_1"]["planned"], trained["seed_1"]["ended_by"]) == (36, reason)
    assert steps == (12 if isinstance(ending, EarlyStopping) else 5)
    text = f"{steps} of 36 steps, ended by {reason}"
    assert f"Not trained to the end: seed_1, seed_2: {text}. What is merged" in capsys.readouterr().err
    assert f"not to the end: {text}." in (callback.dirpath / "seed_1" / "README.md").read_text()
    assert f"seed_2: {text}" in (callback.dirpath / "fused" / "README.md").read_text()
    assert f"seed_1 was not trained to the end: {text}." in write_report(callback.dirpath)["left_out"]


def test_a_fit_that_trains_nothing_ends_the_run(tiny_llama, tmp_path):
    """Whoever calls fit until nothing is pending would wait for ever."""
    callback = SeedEnsembleCallback([1, 2], budget="full", dirpath=tmp_path / "x")
    run = make_trainer(callback, max_time={"seconds": 0})
    with pytest.raises(
        StoppedError, match=r"nothing was trained: trainer\.max_time ended the fit before its first step"
    ):
        run.fit(make_module(tiny_llama), datamodule=make_data())
    assert not list(Path(tmp_path / "x").glob("seed_*"))


def test_a_seed_that_has_all_its_steps_is_finished(tiny_llama, tmp_path, capsys):
    callback = SeedEnsembleCallback([1, 2], dirpath=tmp_path / "x", merge="soup")
    make_trainer(callback, max_epochs=-1, max_steps=4).fit(make_module(tiny_llama), datamodule=make_data())
    row = json.loads((callback.dirpath / "trained.json").read_text())["seed_1"]
    assert (row["steps"], row["planned"]) == (2, 2)
    assert "ended_by" not in row
    assert capsys.readouterr().err == ""
