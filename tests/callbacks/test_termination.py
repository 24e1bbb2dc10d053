"""A run that is told to end by SIGTERM finishes its step, saves it, and goes on to the same bits."""

from __future__ import annotations

import signal

import lightning.pytorch as pl
import pytest

from seedlora.callbacks import SeedEnsembleCallback
from seedlora.training.replicas import StoppedError
from tests.helpers.interventions import Terminate
from tests.helpers.models import make_data, make_module
from tests.helpers.stopping import Validations
from tests.helpers.training import make_trainer


# validations between two steps, and just after the one that is saved
@pytest.mark.parametrize("interval", [6, 4])
def test_sigterm_finishes_the_step_saves_and_resumes_to_the_same_bits(tiny_llama, tmp_path, interval):
    options = {"max_epochs": 4, "accumulate_grad_batches": 4, "val_check_interval": interval}
    before = signal.getsignal(signal.SIGTERM)
    whole = SeedEnsembleCallback([1, 2], patience=9, keep="best", dirpath=tmp_path / "whole")
    run, wanted, found = make_trainer(whole, **options), Validations(), Validations()
    run.callbacks.append(wanted)
    run.fit(make_module(tiny_llama, lora_dropout=0.1), datamodule=make_data())
    assert signal.getsignal(signal.SIGTERM) == before
    callback = SeedEnsembleCallback([1, 2], patience=9, keep="best", dirpath=tmp_path / "x")
    run = make_trainer(callback, **options)
    run.callbacks[:0] = [Terminate(), found]  # before the one that leaves
    with pytest.raises(StoppedError, match="terminated by SIGTERM; step 2 is saved"):
        run.fit(make_module(tiny_llama, lora_dropout=0.1), datamodule=make_data())
    assert signal.getsignal(signal.SIGTERM) == before
    assert callback.ensemble.ckpt_step == 2
    again = SeedEnsembleCallback([1, 2], patience=9, keep="best", dirpath=tmp_path / "x", resume=True)
    run = make_trainer(again, **options)
    run.callbacks.append(found)
    run.fit(
        make_module(tiny_llama, lora_dropout=0.1),
        datamodule=make_data(),
        ckpt_path=callback.ckpt_path,
        weights_only=True,
    )
    for name in ("seed_1", "seed_2", "fused"):
        file = "adapter_model.safetensors"
        assert (tmp_path / "x" / name / file).read_bytes() == (tmp_path / "whole" / name / file).read_bytes()
    assert found == wanted


def test_sigterm_in_the_last_step_is_answered_when_the_seeds_are_written(tiny_llama, tmp_path):
    callback = SeedEnsembleCallback([1, 2], budget="full", dirpath=tmp_path / "x")
    run = make_trainer(callback, max_epochs=1)
    run.callbacks.append(Terminate(11))
    with pytest.raises(StoppedError, match="terminated by SIGTERM after training; the adapters are written"):
        run.fit(make_module(tiny_llama), datamodule=make_data())
    assert callback.pending == ()
    assert not callback.fused_path.exists()
    assert not (tmp_path / "x" / "checkpoints").exists()


class FailInBatch(pl.Callback):
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
        found = make_trainer(
            callback, **{"max_epochs": 1, "limit_train_batches": 1, "limit_test_batches": 1, **options}
        )
        found.callbacks += [answered, *more]
        return found

    run(fast_dev_run=1).fit(module, datamodule=data)
    assert handler() == before
    with pytest.raises(RuntimeError, match="broken"):
        run(FailInBatch(), limit_val_batches=0).fit(module, datamodule=data)
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
            getattr(run(FailInBatch()), stage)(module, datamodule=data, verbose=False)
        assert handler() == before
    assert set(answered) == {"_leave"}
    with pytest.raises(RuntimeError, match="broken"), callback.holding_tested(module):
        assert handler().__qualname__ == "_leave"
        assert list(module.scored.adapters) == ["base", "seed_1", "seed_2", "soup", "fused"]
        raise RuntimeError("broken")
    assert handler() == before
