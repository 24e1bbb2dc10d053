"""The parts of the ensemble's callback: who is called in which order, and what must not come before what."""

from __future__ import annotations

import lightning.pytorch as pl

from seedlora.callbacks import SeedEnsembleCallback, adapter_writer
from seedlora.callbacks.callback_of_parts import HOOKS, CallbackOfParts
from seedlora.run.folder import RunFolder
from tests.helpers.interventions import Poison
from tests.helpers.models import make_data, make_module
from tests.helpers.training import make_trainer


class Noting(pl.Callback):
    def __init__(self, calls, name):
        for hook in HOOKS:
            setattr(self, hook, lambda *args, hook=hook, **named: calls.append((hook, name, args, named)))


def test_every_hook_goes_to_every_part_in_order():
    assert {"setup", "teardown", "on_train_batch_end", "on_exception", "on_save_checkpoint"} <= set(HOOKS)
    calls, callback = [], CallbackOfParts()
    callback.parts = [Noting(calls, "first"), Noting(calls, "second")]
    for hook in HOOKS:
        getattr(callback, hook)("trainer", "module", stage="fit")
        assert [call[:2] for call in calls] == [(hook, "first"), (hook, "second")]
        assert all(call[2:] == (("trainer", "module"), {"stage": "fit"}) for call in calls)
        calls.clear()


def test_the_parts_are_not_the_trainer_s():
    callback = SeedEnsembleCallback()
    assert callback.state_key == "SeedEnsembleCallback"
    stopping, halving = {"best": {}, "idle": [], "left_out": {}}, {"halvings": 0, "dropped": {}}
    assert callback.state_dict() == {**stopping, **halving, "means": {}, "taken": {}, "outer": None}
    assert not {*callback.parts} & {*make_trainer(callback).callbacks}


def test_what_a_fit_writes_in_its_order(tiny_llama, tmp_path, monkeypatch):
    """Until the folders are there the stack is not finished; a rank that still writes may need the checkpoints."""
    happened = []

    def note(owner, name, says):
        original = getattr(owner, name)

        def noted(self, *args, **named):
            happened.append(says(*args))
            return original(self, *args, **named)

        monkeypatch.setattr(owner, name, noted)

    callback = SeedEnsembleCallback([1, 2, 3], budget="full", on_divergence="exclude", dirpath=tmp_path / "x")
    run = make_trainer(callback, max_epochs=1, limit_val_batches=0)
    run.callbacks.append(Poison("seed_2", 5))
    note(RunFolder, "add_trained", lambda rows: f"trained.json of {', '.join(rows)}")
    note(RunFolder, "leave_out", lambda reasons: f"excluded.json of {', '.join(reasons)}")
    note(RunFolder, "forget_checkpoints", lambda names: f"no checkpoints of {', '.join(names) or 'all'}")
    write = adapter_writer.write_replica

    def write_noted(path, name, *args, **named):
        happened.append(f"folder of {name}")
        write(path, name, *args, **named)

    monkeypatch.setattr(adapter_writer, "write_replica", write_noted)
    note(type(run.strategy), "barrier", lambda *_: "barrier")
    fit_end = []
    monkeypatch.setattr(callback, "on_train_end", lambda *args: (fit_end.append(len(happened)), end(*args)))
    end = SeedEnsembleCallback.on_train_end.__get__(callback)
    run.fit(make_module(tiny_llama), datamodule=make_data())
    assert happened[fit_end[0] : fit_end[0] + 8] == [
        "trained.json of seed_1, seed_3",
        "folder of seed_1",
        "folder of seed_3",
        "excluded.json of seed_2",
        "barrier",
        "no checkpoints of seed_1, seed_2, seed_3",
        "no checkpoints of all",
        "barrier",
    ]
