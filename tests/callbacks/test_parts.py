"""The parts of the ensemble's callback: who is called in which order, and what must not come before what."""

from __future__ import annotations

import os
import signal

import lightning.pytorch as pl
import pytest

from seedlora.callbacks import SeedEnsembleCallback
from seedlora.callbacks.callback_of_parts import HOOKS, CallbackOfParts
from seedlora.run.folder import RunFolder
from seedlora.training.module import SeedLoRAModule
from seedlora.training.replicas import StoppedError
from tests.callbacks.test_seed_ensemble import trainer
from tests.helpers.models import make_data, make_module
from tests.helpers.strategies_job import Poison


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
    assert callback.state_dict() == {"best": {}, "idle": [], "diverged": {}}
    assert not {*callback.parts} & {*trainer(callback).callbacks}


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
    run = trainer(callback, max_epochs=1, limit_val_batches=0)
    run.callbacks.append(Poison("seed_2", 5))
    note(RunFolder, "add_trained", lambda rows: f"trained.json of {', '.join(rows)}")
    note(RunFolder, "leave_out", lambda reasons: f"excluded.json of {', '.join(reasons)}")
    note(RunFolder, "forget_checkpoints", lambda names: f"no checkpoints of {', '.join(names) or 'all'}")
    note(SeedLoRAModule, "write", lambda path, name, *_: f"folder of {name}")
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


class Fail(pl.Callback):
    def on_train_batch_start(self, *_):
        raise RuntimeError("broken")

    on_test_batch_start = on_validation_batch_start = on_train_batch_start


def handler():
    return signal.getsignal(signal.SIGTERM)


def test_sigterm_is_given_back_on_every_way_out(tiny_llama, tmp_path):
    module, data, before = make_module(tiny_llama), make_data(), handler()

    class Answered(list, pl.Callback):
        """Whether SIGTERM is answered by us."""

        def on_train_batch_start(self, *_):
            self.append(handler().__qualname__)

        on_test_batch_start = on_validation_batch_start = on_train_batch_start

    callback, answered = SeedEnsembleCallback([1, 2], budget="full", dirpath=tmp_path / "x"), Answered()

    def run(*more, **options):
        found = trainer(callback, **{"max_epochs": 1, "limit_train_batches": 1, "limit_test_batches": 1, **options})
        found.callbacks += [answered, *more]
        return found

    run(fast_dev_run=1).fit(module, datamodule=data)
    assert handler() == before
    with pytest.raises(RuntimeError, match="broken"):
        run(Fail(), limit_val_batches=0).fit(module, datamodule=data)
    assert handler() == before
    run(limit_val_batches=0).fit(module, datamodule=data)
    assert handler() == before
    assert set(answered) == {"Termination._note"}
    answered.clear()
    run().validate(module, datamodule=data, verbose=False)
    assert handler() == before
    run().test(module, datamodule=data, verbose=False)
    assert handler() == before
    for stage in ("validate", "test"):
        with pytest.raises(RuntimeError, match="broken"):
            getattr(run(Fail()), stage)(module, datamodule=data, verbose=False)
        assert handler() == before
    assert set(answered) == {"_leave"}
    with pytest.raises(RuntimeError, match="broken"), callback.holding_tested(module):
        assert handler().__qualname__ == "_leave"
        assert list(module.scored) == ["base", "seed_1", "seed_2", "soup", "fused"]
        raise RuntimeError("broken")
    assert handler() == before


class TerminateInValidation(pl.Callback):
    def on_validation_batch_start(self, *_):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_due_checkpoint_waits_for_the_validation(tiny_llama, tmp_path):
    """With what the validation said in it; a SIGTERM within the validation is answered after the step that follows."""
    saved = []

    class Saved(pl.Callback):
        def on_validation_end(self, trainer, module):
            saved.append([path.name for path in (tmp_path / "x").glob("checkpoints/*/*")])

        def on_save_checkpoint(self, trainer, module, checkpoint):
            best = checkpoint["callbacks"]["SeedEnsembleCallback"]["best"]
            saved.append({name: row["step"] for name, row in best.items()})

    callback = SeedEnsembleCallback(
        [1, 2], budget="full", keep="best", checkpoint_every_n_steps=4, dirpath=tmp_path / "x"
    )
    run = trainer(callback, max_epochs=1, val_check_interval=4, num_sanity_val_steps=0)
    run.callbacks[:0] = [Saved(), TerminateInValidation()]
    with pytest.raises(StoppedError, match="terminated by SIGTERM; step 5 is saved"):
        run.fit(make_module(tiny_llama), datamodule=make_data())
    both = {"seed_1": 4, "seed_2": 4}
    # at the validation's end nothing was saved yet; then the step before it, with its outcome
    assert saved == [[], both, both]
