"""When a checkpoint is saved."""

from __future__ import annotations

import os
import signal

import lightning.pytorch as pl
import pytest

from seedlora.callbacks import JSONLinesLogger, SeedEnsembleCallback
from seedlora.training.replicas import StoppedError
from tests.helpers.interventions import Fail
from tests.helpers.models import make_data, make_module
from tests.helpers.stopping import Validations
from tests.helpers.training import make_trainer


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
    run = make_trainer(callback, max_epochs=1, val_check_interval=4, num_sanity_val_steps=0)
    run.callbacks[:0] = [Saved(), TerminateInValidation()]
    with pytest.raises(StoppedError, match="terminated by SIGTERM; step 5 is saved"):
        run.fit(make_module(tiny_llama), datamodule=make_data())
    both = {"seed_1": 4, "seed_2": 4}
    # at the validation's end nothing was saved yet; then the step before it, with its outcome
    assert saved == [[], both, both]


def test_the_last_step_of_an_epoch_is_saved_too(tiny_llama, tmp_path):
    """Epochs of 12 steps and a checkpoint every 12: there would be none."""

    def fit(name, *callbacks, ckpt_path=None, **options):
        callback = SeedEnsembleCallback(
            [1, 2], patience=9, keep="best", checkpoint_every_n_steps=12, dirpath=tmp_path / name, **options
        )
        logger = JSONLinesLogger(callback.ensemble.metrics_path)
        logger.rewind(callback.ensemble.ckpt_step)
        run = make_trainer(callback, max_epochs=4, logger=logger, log_every_n_steps=1)
        run.callbacks += callbacks
        data = make_data()
        run.fit(make_module(tiny_llama, lora_dropout=0.1), datamodule=data, ckpt_path=ckpt_path, weights_only=True)

    validations, wanted = Validations(), Validations()
    fit("whole", wanted)
    with pytest.raises(RuntimeError, match="killed"):
        fit("x", validations, Fail())
    (checkpoint,) = tmp_path.glob("x/checkpoints/*/*")
    assert checkpoint.name == "step=12.ckpt"
    fit("x", validations, ckpt_path=checkpoint, resume=True)
    for name in ("seed_1", "seed_2", "fused"):
        file = "adapter_model.safetensors"
        assert (tmp_path / "x" / name / file).read_bytes() == (tmp_path / "whole" / name / file).read_bytes()
    assert validations == wanted
    assert (tmp_path / "x" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
