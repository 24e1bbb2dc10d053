"""What is used of Lightning beyond its documentation is still there: one test for each use, named after it."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import ModelParallelStrategy

from seedlora.distributed import lightning_internals
from seedlora.distributed.strategies import FSDP2Strategy


def trainer(**options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(accelerator="cpu", devices=1, enable_model_summary=False, **quiet, **options)


class TestLightning:
    def test_attached_trainer(self):
        module = BoringModel()
        assert lightning_internals.attached_trainer(module) is None
        chosen = trainer(fast_dev_run=True)
        chosen.fit(module)
        assert lightning_internals.attached_trainer(module) is chosen

    @pytest.mark.parametrize("wanted", [True, False])
    def test_uses_distributed_sampler(self, wanted):
        assert lightning_internals.uses_distributed_sampler(trainer(use_distributed_sampler=wanted)) is wanted

    def test_validates_after_batch(self):
        seen = []

        class Watch(pl.Callback):
            def on_train_batch_end(self, trainer, *_):
                seen.append(lightning_internals.validates_after_batch(trainer))

        limits = {"limit_train_batches": 4, "limit_val_batches": 1, "num_sanity_val_steps": 0}
        trainer(max_epochs=1, val_check_interval=2, callbacks=[Watch()], **limits).fit(BoringModel())
        assert seen == [False, True, False, True]

    def test_validates_after_batch_never_without_validation_rows(self):
        assert not lightning_internals.validates_after_batch(trainer(limit_val_batches=0))

    def test_validate_after_steps(self):
        seen = []

        class Watch(pl.Callback):
            def on_validation_end(self, trainer, module):
                seen.append((trainer.global_step, trainer.fit_loop.epoch_loop.batch_idx))

        limits = {"limit_train_batches": 6, "limit_val_batches": 1, "num_sanity_val_steps": 0}
        chosen = trainer(max_epochs=2, accumulate_grad_batches=2, callbacks=[Watch()], **limits)
        lightning_internals.validate_after_steps(chosen, {1, 5})
        chosen.fit(BoringModel())
        # once for each step, as it ends, and at the ends of the epochs
        assert seen == [(1, 1), (3, 5), (5, 3), (6, 5)]
        lightning_internals.validate_after_steps(chosen, ())
        assert "_should_check_val_fx" not in vars(chosen.fit_loop.epoch_loop)

    def test_share_limits(self):
        chosen = trainer(max_epochs=6, max_steps=9)
        lightning_internals.share_limits(chosen, max_epochs=2, max_steps=3)
        assert (chosen.max_epochs, chosen.max_steps) == (2, 3)

    def test_shows_test(self):
        chosen = trainer(fast_dev_run=True)
        for verbose in (True, False):
            chosen.test(BoringModel(), verbose=verbose)
            assert lightning_internals.shows_test(chosen) is verbose

    def test_started_processes(self):
        from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

        assert lightning_internals.started_processes(trainer().strategy) == ()
        launcher = _SubprocessScriptLauncher(cluster_environment=None, num_processes=1, num_nodes=1)
        assert lightning_internals.started_processes(SimpleNamespace(launcher=launcher)) == []

    def test_registered_options(self):
        assert lightning_internals.registered_options("deepspeed_stage_2")["stage"] == 2

    def test_share_data_alone(self):
        strategy = FSDP2Strategy()
        strategy.num_nodes, strategy.parallel_devices = 2, [torch.device("cpu", i) for i in range(3)]
        lightning_internals.share_data_alone(strategy)
        source = inspect.getsource(ModelParallelStrategy.setup_environment)
        for name, value in (("_data_parallel_size", 6), ("_tensor_parallel_size", 1)):
            assert getattr(strategy, name) == value
            assert f"self.{name}" in source

    def test_set_up_without_gpu(self):
        from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy

        # Nothing is passed by but the refusal.
        statements = inspect.getsource(DeepSpeedStrategy.setup_environment).strip().splitlines()
        assert statements[-1].strip() == "super().setup_environment()"
        assert issubclass(DeepSpeedStrategy, DDPStrategy)
        assert sum("raise " in line for line in statements) == 1
