"""Halving with ``halved_rows shared``: the replicas that go on have more rows in a step."""

from __future__ import annotations

import json

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from seedlora.adapters.reading import read_adapter
from seedlora.callbacks import SeedEnsembleCallback
from seedlora.datamodules.sampler import Growth
from seedlora.training.module import SeedLoRAModule
from seedlora.training.replicas import FitSettings, Replica, StoppedError
from tests.helpers.interventions import Terminate
from tests.helpers.models import make_data, make_module
from tests.helpers.precision import SAME
from tests.helpers.stopping import fit_scripted
from tests.helpers.training import largest_difference, make_trainer, saved

#: Of four replicas two go on after step 3 of 12, and one, seed 2, after step 6.
LOSSES = {"seed_1": [1.0, 4.0], "seed_2": [2.0, 3.0], "seed_3": [3.0], "seed_4": [float("nan")]}
GROWTH = Growth([3, 6], [2, 4], steps_per_epoch=12)


class FixedRows(pl.LightningDataModule):
    """A data module of a user's own, whose steps have the rows that they have."""

    seeds = (1,)

    def train_dataloader(self):
        batch = {"input_ids": torch.ones(4, 2, 5, dtype=torch.long), "labels": torch.ones(4, 2, 5, dtype=torch.long)}
        return DataLoader([batch | {"num_items": torch.full((4,), 8)}] * 12, batch_size=None)

    def val_dataloader(self):
        return self.train_dataloader()

    test_dataloader = val_dataloader


def ensemble(dirpath, *, seeds=(1, 2, 3, 4), halving=(0.25, 0.5), **options):
    return SeedEnsembleCallback(
        seeds, budget="full", halving=halving, halved_rows="shared", dirpath=dirpath, merge="soup", **options
    )


@pytest.mark.usefixtures("float64")
def test_a_survivor_learns_what_it_would_alone_with_as_many_rows(tiny_llama, tmp_path):
    callback = ensemble(tmp_path / "x")
    fit_scripted(tiny_llama, callback, LOSSES, max_epochs=1)
    assert callback.trained == ("seed_2",)
    # alone, by the Trainer without the callback
    module, data = SeedLoRAModule(tiny_llama, dtype="float32", r=4), make_data()
    module.prepare_fit(FitSettings((Replica("seed_2", 2, 2),), total_steps=12))
    data.seeds, data.growth = (2,), GROWTH
    make_trainer(pl.Callback(), max_epochs=1).fit(module, datamodule=data)
    found = read_adapter(callback.adapter_path(2)).layers
    assert largest_difference(found, module.stack.factors(["seed_2"])) < SAME
    sampler = data.train_dataloader().sampler
    row = json.loads((callback.dirpath / "trained.json").read_text())["seed_2"]
    assert (row["tokens"], row["scored"]) == sampler.seen(2, 12, steps_per_epoch=12)


@pytest.mark.parametrize("stop", [4, 8])
def test_a_resume_has_the_same_rows_to_the_same_bits(tiny_llama, tmp_path, stop):
    runs = {}
    for name in ("whole", "killed"):
        for resume in (False, True)[: 2 if name == "killed" else 1]:
            callback = ensemble(tmp_path / name, resume=resume, checkpoint_every_n_steps=1)
            run = make_trainer(callback, max_epochs=1)
            module = make_module(tiny_llama, lora_dropout=0.1)
            arguments = {"datamodule": make_data(), "ckpt_path": callback.ckpt_path, "weights_only": True}
            if name == "killed" and not resume:
                run.callbacks.append(Terminate(stop - 1))
                with pytest.raises(StoppedError, match=f"step {stop} is saved"):
                    run.fit(module, **arguments)
            else:
                run.fit(module, **arguments)
        runs[name] = callback
    for folder in (*runs["whole"].trained, "fused"):
        found, wanted = (saved(runs[name].dirpath / folder) for name in ("killed", "whole"))
        assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


def test_the_plan_says_how_many_rows_they_have(tiny_llama, tmp_path, capsys):
    callback = ensemble(tmp_path / "x", seeds=(1, 2, 3), halving=[0.25, 0.5])
    make_trainer(callback, max_epochs=1).fit(make_module(tiny_llama), datamodule=make_data())
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    # nine steps of three, then three of two, then six of one with three times the rows
    assert "2 after step 3, 1 after step 6 with 3 times the rows; 8% of the tokens are saved" in told
    assert json.loads((tmp_path / "x" / "cost.json").read_text())["plan"]["replica_steps"] == 33


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"halving": None}, "halved_rows='shared' is of halving, which is not given"),
        (
            {"halving": [0.5]},
            "the 1 dropped of 3 replicas cannot be dealt to 2 in equal parts; train 4, or halve twice",
        ),
        ({"halving": [0.5], "halved_rows": "given"}, "halved_rows"),
    ],
)
def test_what_cannot_be_shared_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SeedEnsembleCallback(**{"seeds": (1, 2, 3), "halved_rows": "shared", **options})


def test_a_data_module_that_cannot_give_more_rows_is_refused(tiny_llama, tmp_path):
    data = FixedRows()
    with pytest.raises(ValueError, match="FixedRows has no attribute growth, which says so; take saved, or wrap"):
        make_trainer(ensemble(tmp_path / "x"), max_epochs=1).fit(make_module(tiny_llama), datamodule=data)
