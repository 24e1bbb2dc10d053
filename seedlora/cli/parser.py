"""The options of ``train.py``."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from seedlora.callbacks import EnsembleProgressBar, SeedEnsembleCallback, Throughput
from seedlora.callbacks.json_lines import JSONLinesLogger, metrics_logger
from seedlora.cli.errors import UsageError, one_line, plain_message
from seedlora.cli.train_help import help_text, unknown_option
from seedlora.datamodules import InstructionDataModule, all_data_modules
from seedlora.distributed.strategies import choose_strategy
from seedlora.evaluation.tasks import TASKS
from seedlora.names import UNFINISHED_NAME
from seedlora.run.ensemble import Ensemble
from seedlora.training.module import SeedLoRAModule
from seedlora.utils.spelling import closest

#: The data module if none is named.
DEFAULT_DATA = "seedlora.datamodules.ReasoningGym"
#: What a run of train.py sets where Lightning's own default does not suit it.
TRAINER_DEFAULTS = {
    "devices": 1,  # more GPUs would make more rows of an optimizer step, and other adapters, unasked
    "max_epochs": 3,
    "gradient_clip_val": 1.0,
    "val_check_interval": 0.5,
    "num_sanity_val_steps": 0,
    "inference_mode": False,  # weights that a validation gathers may stay gathered, and training cannot use them then
    "log_every_n_steps": 1,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}


class _Parser(LightningArgumentParser):
    """Our help, a hint for a misspelt option, and one line per error."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = plain_message(message)
        if word := re.search(r"[Uu]nrecognized arguments: ([^-\s]\S*)", message):
            message = (
                f"unexpected word '{word[1]}'; an option takes one word, a list is '[1,2]', the one command is test"
            )
        elif unknown := re.search(r"(?:[Uu]nrecognized arguments: |Key ')-*([\w.]+)", message):
            message = unknown_option(unknown[1])
        raise UsageError(message) from ex

    def format_help(self, _formatter: object = None) -> str:
        return help_text()


class SeedLoRACLI(LightningCLI):
    """LightningCLI with the ensemble as its own group of options."""

    def __init__(self, args: Sequence[str]) -> None:
        all_data_modules()  # --data takes those that are imported, and help and errors name them
        self.throughput = Throughput()
        super().__init__(
            SeedLoRAModule,
            InstructionDataModule,
            subclass_mode_data=True,
            run=False,
            # Named first and not set as a default: a default's options would go on to the module that replaces it.
            args=["--data", DEFAULT_DATA, *args],
            parser_class=_Parser,
            save_config_callback=None,
            trainer_defaults={**TRAINER_DEFAULTS, "callbacks": [EnsembleProgressBar()]},
            seed_everything_default=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )
        self.callback.leave_plan_and_report()

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the ensemble."""
        parser.add_lightning_class_args(SeedEnsembleCallback, "ensemble")
        scores = parser.add_argument_group("Scores by generation, after training")
        add, some = scores.add_argument, {"metavar": "N", "type": int | None, "default": None}
        add("--evaluate.task", type=str, default="", metavar="A,B", help=f"from {', '.join(TASKS)}")
        add("--evaluate.limit", **some, help="only the first items of each")
        add("--evaluate.task_path", type=dict[str, str], default={}, metavar="{}", help="files of tasks, by task")
        add("--evaluate.max_new_tokens", **some, help="default: the protocol's")
        add("--evaluate.batch_size", type=int, default=16, metavar="N", help="items in one forward")
        add("--evaluate.execute_code", type=bool, default=False, help="run code, inside bubblewrap")
        add("--evaluate.lm_eval", type=str, default="", metavar="A,B", help="tasks of lm-evaluation-harness")
        own = "YAML files of your own tasks"
        add("--evaluate.lm_eval_path", type=Path | None, default=None, metavar="DIR", help=own)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and find the run that ``--resume`` means."""
        try:
            self.config = parser.parse_args(args)
        except UsageError as error:
            raise UsageError(self._data_error(str(error))) from None
        ensemble = self.config.ensemble
        if ensemble.resume and ensemble.dirpath is None:
            unfinished = [*Path("runs").glob(f"*/{UNFINISHED_NAME}")]
            if not unfinished:
                raise UsageError("--resume found no unfinished run under runs; name one by --ensemble.dirpath")
            ensemble.dirpath = str(max(unfinished, key=lambda file: file.stat().st_mtime).parent)

    def _data_error(self, message: str) -> str:
        """What is wrong with ``--data`` in our words; any other message as it is."""
        if option := re.match(r"--data: Option '(\w+)' is not accepted", message):
            return f"unknown option --data.{option[1]}; --data.help NAME shows those of a data module"
        if option := re.match(r"--data: the following arguments are required: (\w+)", message):
            return f"this data module needs --data.{option[1]}"
        if name := re.match(r"--\.*data(?:\.help)?: .*dot import path string: (\S+)", message):
            known = sorted(kind.__name__ for kind in _concrete(InstructionDataModule))
            meant = closest(name[1], known)
            hint = f"did you mean {meant}? " if meant else ""
            return f"unknown data module '{name[1]}'; {hint}data modules are {', '.join(known)}"
        return message

    @property
    def callback(self) -> SeedEnsembleCallback:
        """Return the callback that runs the ensemble."""
        callback: SeedEnsembleCallback = self.config_init.ensemble
        return callback

    @property
    def ensemble(self) -> Ensemble:
        """Return what is trained, fused and compared."""
        return self.callback.ensemble

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """A trainer for the next stack of seeds, with its metrics file beside whatever logger was chosen."""
        options = self.config_init.trainer
        chosen = options.callbacks or []
        # Each trainer has its own: one that stopped a stack would stop the next one too.
        chosen = copy.deepcopy(chosen if isinstance(chosen, list) else [chosen])
        # The clock comes before the ensemble, which merges when training ends; those of the defaults come after it.
        kwargs["callbacks"] = [self.throughput, *chosen]
        if any(isinstance(callback, Checkpoint) for callback in chosen):
            kwargs["enable_checkpointing"] = True
        if options.enable_progress_bar is False:  # Lightning adds the defaults itself, and refuses a bar then
            self.trainer_defaults["callbacks"] = []
        kwargs["strategy"] = choose_strategy(options.strategy, accelerator=options.accelerator)
        if options.logger in (None, True):
            kwargs["logger"] = JSONLinesLogger(self.ensemble.metrics_path)
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, TypeError, ValueError, ImportError, RuntimeError) as error:
            raise UsageError(f"Lightning's Trainer refuses these options: {one_line(str(error))}") from error
        self.metrics = None if trainer.fast_dev_run else metrics_logger(trainer, self.ensemble.metrics_path)
        return trainer


def _concrete(kind: type) -> list[type]:
    """The subclasses that can be made, at any depth."""
    children: list[type] = kind.__subclasses__()
    below = [found for child in children for found in _concrete(child)]
    return below if inspect.isabstract(kind) else [kind, *below]
