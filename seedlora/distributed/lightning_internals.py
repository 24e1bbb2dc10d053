"""All that is used of Lightning beyond what its documentation promises, one function for each use.

``tests/distributed/test_lightning_internals.py`` fails by the function's name when a release takes one of
these away.
"""

from __future__ import annotations

import subprocess
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, StrategyRegistry

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy


def attached_trainer(module: pl.LightningModule) -> pl.Trainer | None:
    """Return the trainer that a module is in, or None.

    ``LightningModule.trainer`` raises an error where there is none; ``_trainer`` is what it reads.
    """
    return module._trainer


def uses_distributed_sampler(trainer: pl.Trainer) -> bool:
    """Return whether the trainer would replace a data loader's sampler by its own, one for each process.

    The trainer's argument ``use_distributed_sampler`` is kept by ``_accelerator_connector`` alone.
    """
    return bool(trainer._accelerator_connector.use_distributed_sampler)


def is_barebones(trainer: pl.Trainer) -> bool:
    """Return whether the trainer is bare: it logs nothing then, and says so for each value.

    The trainer keeps its argument ``barebones`` under ``barebones``.
    """
    return bool(trainer.barebones)


def validates_after_batch(trainer: pl.Trainer) -> bool:
    """Return whether the training loop will validate after the batch at hand.

    The loop decides it by ``_should_check_val_fx`` after the hook ``on_train_batch_end``; no public attribute tells.
    """
    loop = trainer.fit_loop
    return bool(trainer.enable_validation and loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def validate_after_steps(trainer: pl.Trainer, steps: Collection[int]) -> None:
    """Have the training loop validate after these optimizer steps too; without any it goes its own way again.

    The loop's ``_should_check_val_fx`` decides it: one that knows the steps is put before it.
    """
    loop = trainer.fit_loop.epoch_loop
    vars(loop).pop("_should_check_val_fx", None)
    if not steps:
        return
    own = loop._should_check_val_fx

    def should_validate(fetcher: Any) -> bool:
        ends_step = not (loop.batch_idx + 1) % trainer.accumulate_grad_batches or trainer.is_last_batch
        return own(fetcher) or (trainer.enable_validation and ends_step and trainer.global_step in steps)

    vars(loop)["_should_check_val_fx"] = should_validate


def share_limits(trainer: pl.Trainer, *, max_epochs: int | None, max_steps: int) -> None:
    """Set how long a fit goes on: the Trainer's own arguments can only be read.

    They are ``fit_loop.max_epochs`` and ``fit_loop.epoch_loop.max_steps``, from which progress bars show the total.
    """
    trainer.fit_loop.max_epochs = max_epochs
    trainer.fit_loop.epoch_loop.max_steps = max_steps


def shows_test(trainer: pl.Trainer) -> bool:
    """Return whether ``Trainer.test`` was called to print what it finds, which its loop keeps as ``verbose``."""
    return bool(trainer.test_loop.verbose)


def started_processes(strategy: Strategy) -> Sequence[subprocess.Popen[bytes]]:
    """Return the processes that a strategy's launcher started on this machine: those of the other local ranks.

    They are ``procs`` of Lightning's ``_SubprocessScriptLauncher``; other launchers, and the other ranks, have none.
    """
    return getattr(strategy.launcher, "procs", ())


def registered_options(name: str) -> Mapping[str, Any]:
    """Return the arguments with which Lightning makes the strategy of a name, such as ``deepspeed_stage_2``.

    The entries of ``StrategyRegistry`` keep them under ``init_params``.
    """
    return StrategyRegistry[name]["init_params"]


def share_data_alone(strategy: ModelParallelStrategy) -> None:
    """Let all processes of a strategy share the data, and none a layer's work, whatever their number.

    Lightning's ``data_parallel_size`` is a number or the number of nodes; that of the processes is known only when
    ``setup_environment`` is called, which reads ``_data_parallel_size`` and ``_tensor_parallel_size``.
    """
    strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes
    strategy._tensor_parallel_size = 1


def set_up_without_gpu(strategy: DeepSpeedStrategy) -> None:
    """Set up the processes of a DeepSpeed strategy as DDP does.

    ``DeepSpeedStrategy.setup_environment`` only refuses to run without a GPU, and goes on with the method of
    ``DDPStrategy``; calling that one passes by the refusal.
    """
    DDPStrategy.setup_environment(strategy)
