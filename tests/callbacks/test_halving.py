"""Successive halving: the replicas with the higher validation losses are dropped at parts of a run."""

from __future__ import annotations

import json

import pytest
import torch

from seedlora.adapters.reading import read_adapter
from seedlora.callbacks import SeedEnsembleCallback
from seedlora.cli.main import main
from seedlora.training.replicas import StoppedError
from tests.helpers.interventions import StopAfter, Terminate
from tests.helpers.models import make_data, make_module
from tests.helpers.precision import SAME
from tests.helpers.stopping import Validations, fit_scripted
from tests.helpers.training import OPTIONS, largest_difference, make_trainer, saved

#: At steps 3 and 6 of 12 the losses say that seeds 3 and 4 go, then seed 1.
LOSSES = {"seed_1": [1.0, 4.0], "seed_2": [2.0, 3.0], "seed_3": [3.0], "seed_4": [float("nan")]}


class Drop(StopAfter):
    """Drops replicas after a step, as somebody would who knew it beforehand."""

    def __init__(self, step, names):
        super().__init__(step)
        self.names = names

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            module.replicas.leave_out(dict.fromkeys(self.names, "known beforehand"))


def ensemble(dirpath, halving, *, seeds=(1, 2, 3, 4), **options):
    return SeedEnsembleCallback(seeds, budget="full", halving=halving, dirpath=dirpath, merge="soup", **options)


def trained(callback):
    return json.loads((callback.dirpath / "trained.json").read_text())


def test_the_worse_half_is_dropped_at_its_steps_and_trains_no_more(tiny_llama, tmp_path):
    callback = ensemble(tmp_path / "x", [0.25, 0.5])
    module, run = fit_scripted(tiny_llama, callback, LOSSES, max_epochs=1)
    rows = trained(callback)
    assert {name: (row["steps"], row.get("dropped")) for name, row in rows.items()} == {
        "seed_1": (6, 6),
        "seed_2": (12, None),
        "seed_3": (3, 3),
        "seed_4": (3, 3),
    }
    assert callback.trained == ("seed_2",)
    assert not callback.pending
    assert callback.ensemble.excluded == {
        "seed_1": "its validation loss after step 6 was 4.0000, in the worse half of 2",
        "seed_3": "its validation loss after step 3 was 3.0000, in the worse half of 4",
        "seed_4": "its validation loss after step 3 was nan, in the worse half of 4",
    }
    # a validation every third step: what is dropped stays as it was
    for name, since in (("seed_1", 1), ("seed_3", 0), ("seed_4", 0)):
        assert all(map(torch.equal, module.weights[since][name], module.weights[3][name]))
    lengths, sampler = run.datamodule.rows["train"].lengths, run.datamodule.train_dataloader().sampler
    sampler.set_epoch(0)
    for seed, steps in ((1, 6), (2, 12), (3, 3)):
        saw = sum(int(lengths[sampler.order(seed, step)].sum()) for step in range(steps))
        assert rows[f"seed_{seed}"]["tokens"] == saw


@pytest.mark.usefixtures("float64")
def test_survivors_learn_what_they_learn_without_the_others(tiny_llama, tmp_path):
    plain = SeedEnsembleCallback((2,), budget="full", dirpath=tmp_path / "plain")
    fit_scripted(tiny_llama, plain, {}, max_epochs=1)
    callback = ensemble(tmp_path / "x", [0.25, 0.5])
    fit_scripted(tiny_llama, callback, LOSSES, max_epochs=1)
    found, wanted = (read_adapter(each.adapter_path(2)).layers for each in (callback, plain))
    assert largest_difference(found, wanted) < SAME


def test_survivors_have_the_bits_of_a_run_that_dropped_the_same_by_hand(tiny_llama, tmp_path):
    plain = ensemble(tmp_path / "plain", None)
    module, run = make_module(tiny_llama, lora_dropout=0.1), make_trainer(plain, max_epochs=1, **OPTIONS)
    names = ["seed_1", "seed_2", "seed_3", "seed_4"]
    run.callbacks.append(validations := Validations())
    callback = ensemble(tmp_path / "x", [0.5])
    halved = make_trainer(callback, max_epochs=1, **OPTIONS)
    halved.callbacks.append(validations)
    halved.fit(make_module(tiny_llama, lora_dropout=0.1), datamodule=make_data())
    # steps of two batches, six in all; beside the end of the epoch it validates after the third alone
    assert validations == [3, 6]
    dropped = [name for name in names if name not in callback.trained]
    assert len(dropped) == 2
    run.callbacks[:] = [*run.callbacks[:-1], Drop(3, dropped)]
    run.fit(module, datamodule=make_data())
    for name in callback.trained:
        found, wanted = saved(callback.adapter_path(name)), saved(plain.adapter_path(name))
        assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())
    assert saved(callback.fused_path).keys() == saved(plain.fused_path).keys()


@pytest.mark.parametrize("stop", [4, 5, 6, 8])
def test_a_resume_drops_the_same_to_the_same_bits(tiny_llama, tmp_path, stop):
    """Killed before, at and after the validation of a halving, which is none of the Trainer's own."""
    runs = {}
    for name in ("whole", "killed"):
        for resume in (False, True)[: 2 if name == "killed" else 1]:
            callback = ensemble(tmp_path / name, [0.2, 0.5], seeds=(1, 2, 3), resume=resume, checkpoint_every_n_steps=1)
            run = make_trainer(callback, max_epochs=1)
            run.callbacks.insert(0, seen := Validations())
            if name == "killed" and not resume:
                run.callbacks.append(Terminate(stop - 1))
            arguments = {"datamodule": make_data(), "ckpt_path": callback.ckpt_path, "weights_only": True}
            module = make_module(tiny_llama, lora_dropout=0.1)
            if name == "killed" and not resume:
                with pytest.raises(StoppedError, match=f"step {stop} is saved"):
                    run.fit(module, **arguments)
                before = list(seen)
            else:
                run.fit(module, **arguments)
        runs[name] = callback
    assert before + seen == [2, 6, 12]
    assert runs["killed"].ensemble.excluded == runs["whole"].ensemble.excluded
    assert trained(runs["killed"]) == trained(runs["whole"])
    for folder in (*runs["whole"].trained, "fused"):
        found, wanted = (saved(runs[name].dirpath / folder) for name in ("killed", "whole"))
        assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


def test_one_that_was_stopped_by_patience_takes_part(tiny_llama, tmp_path):
    callback = ensemble(tmp_path / "x", [0.75], seeds=(1, 2), patience=1, keep="best")
    _, run = fit_scripted(tiny_llama, callback, {"seed_1": [1, 2], "seed_2": [5, 4, 3, 2]}, max_epochs=1)
    rows = trained(callback)
    assert (rows["seed_1"]["steps"], rows["seed_1"]["stopped"]) == (6, True)
    assert (rows["seed_2"]["steps"], rows["seed_2"]["dropped"], rows["seed_2"]["kept_step"]) == (9, 9, None)
    # nobody trains any more
    assert run.global_step == 9
    assert callback.trained == ("seed_1",)


def test_a_sweep_says_who_was_dropped_where(tiny_llama, tmp_path, capsys):
    callback = ensemble(tmp_path / "x", [0.5], seeds=(1, 2), sweep={"r": [2, 4]})
    module, data, run = make_module(tiny_llama), make_data(), make_trainer(callback, max_epochs=1)
    run.fit(module, datamodule=data)
    run.test(module, datamodule=data, verbose=False)
    dropped = callback.ensemble.excluded
    assert len(dropped) == len(callback.trained) == 2
    assert json.loads((tmp_path / "x" / "results.json").read_text())["left_out"] == dropped
    report = json.loads((tmp_path / "x" / "report.json").read_text())
    shown = [drop for row in report["sweep"]["rows"] for drop in row["dropped"].values()]
    assert [drop["step"] for drop in shown] == [6, 6]
    assert report["sweep"]["best"] in callback.trained
    assert all(f"{name} was left out: {why}." in report["left_out"] for name, why in dropped.items())
    # eight rows are too few to show anything
    assert all("; on 8 rows it is not shown to be worse than seed_" in why for why in dropped.values())
    steps = {name: row["steps"] for name, row in report["trained_on"].items()}
    assert sorted(steps.values()) == [6, 6, 12, 12]
    told = capsys.readouterr()
    assert "Halving after step 6: " in told.err + told.out
    assert "2 after step 6; 25% of the tokens" in " ".join(told.out.split())
    assert main(["report", str(tmp_path / "x")]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"halving": []}, "is a list of parts of the steps between 0 and 1, ascending"),
        ({"halving": [0.5, 0.25]}, "ascending, .* got .0.5, 0.25."),
        ({"halving": [1.0]}, "between 0 and 1"),
        ({"halving": [0.2, 0.4, 0.6]}, "halving: 0.6 would drop nobody: of 3 replicas one is left by then"),
        ({"halving": [0.5], "seeds": [1]}, "of 1 replica one is left from the start"),
        ({"halving": [0.5], "scheme": "local"}, "halving drops replicas, from which the others learn"),
        ({"halving": [0.5], "keep": "best_fused"}, "compares validations of one fused adapter"),
        ({"halving": [0.5], "controls": "all"}, "trains one seed for the tokens of all"),
    ],
)
def test_what_does_not_go_with_it_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SeedEnsembleCallback(**{"seeds": (1, 2, 3), **options})


@pytest.mark.parametrize(
    ("options", "trainer", "message"),
    [
        (
            {},
            {"limit_val_batches": 0},
            "halving drops the replicas with the higher losses on validation rows",
        ),
        ({"stack_size": 1}, {}, "halving trains all 2 replicas at once, and stack_size is 1"),
        ({"halving": [0.5, 0.51], "seeds": (1, 2, 3)}, {}, "0.51 of 12 steps is step 6, which must be after step 6"),
        ({"halving": [0.01]}, {}, "0.01 of 12 steps is step 0"),
    ],
)
def test_what_a_run_cannot_do_is_refused_before_it_starts(tiny_llama, tmp_path, options, trainer, message):
    callback = SeedEnsembleCallback(
        **{"seeds": (1, 2), "halving": [0.5], "budget": "full", "dirpath": tmp_path / "x", **options}
    )
    with pytest.raises(ValueError, match=message):
        make_trainer(callback, max_epochs=1, **trainer).fit(make_module(tiny_llama), datamodule=make_data())
    assert not (tmp_path / "x").exists()
