"""Print and write what belongs around a fit and a test where a user's own code runs the Trainer."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary, ProgressBar
from lightning.pytorch.loggers import Logger
from rich.console import Console

from seedlora.callbacks.callback_of_parts import CallbackOfParts
from seedlora.callbacks.json_lines import JSONLinesLogger, metrics_logger
from seedlora.distributed.lightning_internals import shows_test
from seedlora.report.terminal import told_report
from seedlora.run.budget import shared_limits
from seedlora.run.conclusion import conclusion, left_out
from seedlora.run.cost import write_cost
from seedlora.run.ensemble import Ensemble
from seedlora.run.opening import opening
from seedlora.run.plan import run_plan
from seedlora.run.plan_advice import plan_advice
from seedlora.run.python_config import python_config
from seedlora.run.stack_data import PlannedData
from seedlora.training.module import SeedLoRAModule
from seedlora.utils.files import write_text
from seedlora.utils.progress import plain_console, show
from seedlora.utils.say import say

#: The name of Lightning's own logger.
_LOGS = "lightning_logs"


class RunStart(pl.Callback):
    """Print the plan before the first fit of a run from Python, and write down its options and its metrics.

    ``train.py`` does the same around its own fits, and leaves this out.

    Args:
        ensemble: the run.
    """

    def __init__(self, ensemble: Ensemble) -> None:
        self._ensemble = ensemble
        self._is_told = False
        self._metrics: JSONLinesLogger | None = None

    def setup(self, trainer: pl.Trainer, module: SeedLoRAModule, stage: str) -> None:
        """Say what is going to be done, once; write ``config.yaml`` and ``cost.json``."""
        if stage != "fit" or trainer.fast_dev_run:
            return
        ensemble, data = self._ensemble, trainer.datamodule
        own = [*_own_callbacks(trainer), *_own_loggers(trainer)]
        if not trainer.loggers:
            trainer.log_every_n_steps = 1  # the report draws curves, and nobody asked for fewer points
        self._metrics = metrics_logger(trainer, ensemble.metrics_path)
        if self._is_told or not trainer.is_global_zero:
            return
        self._is_told = True
        write_text(ensemble.dirpath / "config.yaml", python_config(trainer, module, data, ensemble, besides=own))
        plan = run_plan(trainer, module.options, data, ensemble) if isinstance(data, PlannedData) else None
        if plan is not None:
            write_cost(ensemble.dirpath, plan, getattr(data, "libraries", ()))
        advice = [] if plan is None else plan_advice(trainer, module.options, data, ensemble)
        shared = shared_limits(ensemble.options, trainer)
        show(_console(), [*opening(plan, data, advice), *([] if shared is None else [shared])])

    def on_train_start(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """Drop the metrics of steps that are going to be repeated."""
        if self._metrics is not None:
            self._metrics.rewind(trainer.global_step)


class RunEnd(pl.Callback):
    """Say, after a test from Python, which adapter to use, and write the report; ``train.py`` leaves this out too.

    Args:
        ensemble: the run.
    """

    def __init__(self, ensemble: Ensemble) -> None:
        self._ensemble = ensemble

    def on_test_end(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """Say what ``Trainer.test`` was asked to print; a fault in the report does not cost the test, whose scores
        are written by now.
        """
        run = self._ensemble.dirpath
        if trainer.fast_dev_run or not trainer.is_global_zero:
            return
        told = [*left_out(self._ensemble), *conclusion(self._ensemble), *told_report(run, say)]
        if shows_test(trainer):
            show(_console(), told)


def _console() -> Console:
    return plain_console(soft_wrap=not sys.stdout.isatty())


def _own_callbacks(trainer: pl.Trainer) -> Sequence[pl.Callback]:
    """Return the callbacks of a Trainer beside the ensemble, what only shows, and what Lightning adds by itself."""
    shown = (CallbackOfParts, ProgressBar, ModelSummary)
    added = ModelCheckpoint().state_key
    own = [callback for callback in trainer.callbacks if not isinstance(callback, shown)]
    return [callback for callback in own if callback.state_key != added]


def _own_loggers(trainer: pl.Trainer) -> Sequence[Logger]:
    """Return the loggers of a Trainer beside the one that Lightning makes where none is given."""
    return [each for each in trainer.loggers if (each.name, each.save_dir) != (_LOGS, trainer.default_root_dir)]
