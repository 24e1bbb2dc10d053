"""Print and write what belongs around a fit and a test where a user's own code runs the Trainer."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary, ProgressBar
from lightning.pytorch.loggers import Logger

from seedlora.callbacks.callback_of_parts import CallbackOfParts
from seedlora.callbacks.json_lines import JSONLinesLogger
from seedlora.datamodules.prompts import asked_of_a_server
from seedlora.distributed.lightning_internals import shows_test
from seedlora.report.page import write_report
from seedlora.run.budget import shared_limits
from seedlora.run.conclusion import conclusion
from seedlora.run.cost import write_cost
from seedlora.run.ensemble import Ensemble
from seedlora.run.plan import run_plan
from seedlora.run.python_config import python_config
from seedlora.run.stack_data import HasPrompt, PlannedData
from seedlora.training.module import SeedLoRAModule
from seedlora.utils.files import write_text
from seedlora.utils.progress import plain_console
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
        self._metrics = _metrics_logger(trainer, ensemble)
        if self._is_told or not trainer.is_global_zero:
            return
        self._is_told, console = True, plain_console()
        write_text(ensemble.dirpath / "config.yaml", python_config(trainer, module, data, ensemble, besides=own))
        if isinstance(data, PlannedData):
            plan = run_plan(trainer, module.options, data, ensemble)
            write_cost(ensemble.dirpath, plan, getattr(data, "libraries", ()))
            console.print(plan.table())
        if isinstance(data, HasPrompt):
            asked = asked_of_a_server(data.prompt_record())
            console.print(f"prompt: {asked}", highlight=False, soft_wrap=True)
        if sentence := shared_limits(ensemble.options, trainer):
            console.print(sentence, highlight=False, soft_wrap=True)

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
        told = conclusion(self._ensemble)
        try:
            write_report(run)
        except Exception as error:
            say(f"no report: {type(error).__name__}: {error}; the run is whole; try: python -m seedlora report {run}")
        else:
            told.append(f"report: {run / 'report.html'}")
        if shows_test(trainer):
            console = plain_console(soft_wrap=True)
            for each in told:
                console.print(each, highlight=False)


def _own_callbacks(trainer: pl.Trainer) -> Sequence[pl.Callback]:
    """Return the callbacks of a Trainer beside the ensemble, what only shows, and what Lightning adds by itself."""
    shown = (CallbackOfParts, ProgressBar, ModelSummary)
    added = ModelCheckpoint().state_key
    own = [callback for callback in trainer.callbacks if not isinstance(callback, shown)]
    return [callback for callback in own if callback.state_key != added]


def _own_loggers(trainer: pl.Trainer) -> Sequence[Logger]:
    """Return the loggers of a Trainer beside the one that Lightning makes where none is given."""
    return [each for each in trainer.loggers if (each.name, each.save_dir) != (_LOGS, trainer.default_root_dir)]


def _metrics_logger(trainer: pl.Trainer, ensemble: Ensemble) -> JSONLinesLogger:
    """Return the logger that writes the metrics of this fit into the run's folder, beside the Trainer's own.

    Where it is the only one, every step is logged, as ``train.py`` does: the report draws curves of them.
    """
    loggers: list[Logger] = trainer.loggers
    if not loggers:
        trainer.log_every_n_steps = 1
    for logger in loggers:
        if isinstance(logger, JSONLinesLogger):
            logger.path = ensemble.metrics_path
            return logger
    metrics = JSONLinesLogger(ensemble.metrics_path)
    trainer.loggers = [*loggers, metrics]
    return metrics
