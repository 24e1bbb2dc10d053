"""The options of ``train.py``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, Protocol

import lightning.pytorch as pl
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from seedlora.cli.argparse_internals import option_groups, option_names
from seedlora.cli.errors import UsageError, plain_message
from seedlora.distributed.strategies import choose_strategy
from seedlora.evaluation.candidates import Prompts
from seedlora.evaluation.tasks import TASKS, Generate
from seedlora.names import ALL_CONTROLS, UNFINISHED_NAME
from seedlora.run.cost import PhaseClock
from seedlora.run.ensemble import Ensemble
from seedlora.run.stack_data import StackData
from seedlora.training.module import SeedLoRAModule
from seedlora.utils.spelling import closest

USAGE = """\
Train LoRA replicas of one task with different seeds as one stack, and merge them into one adapter.

  python train.py --merge seedlora                     SmolLM2-135M on embedded data, seeds 11, 42, 202
  python train.py --merge soup --ensemble.seeds "[1,2,3]" --trainer.max_epochs 6
  python train.py --config configs/default.yaml --model.r 16
  python train.py --merge auto --compare ties,knots_ties   the method that is best on validation rows; others beside it
  python train.py --merge seedlora --controls          one seed for all tokens, one of all ranks, and other controls
  python train.py --merge seedlora --resume            go on with the newest unfinished run
  python train.py --merge seedlora --plan              what the run will take, measured on a few steps
  python train.py --evaluate gsm8k --evaluate_limit 100    then score all adapters on GSM8K
  python train.py test --ensemble.dirpath RUN          score a finished run again, without training
"""
SHORT = {
    "--merge": "--ensemble.merge",
    "--compare": "--ensemble.compare",
    "--controls": "--ensemble.controls",
    "--resume": "--ensemble.resume",
}
#: What the short options mean that are given without a value.
BARE = {"--resume": "true", "--controls": ALL_CONTROLS}
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
TRAINER_SHOWN = ("max_epochs", "max_steps", "accelerator", "devices", "strategy", "accumulate_grad_batches")


class EnsembleCallback(Protocol):
    """Offer what the command line uses of the callback that runs an ensemble: none of Lightning's hooks."""

    ensemble: Ensemble

    def check_validation(self, trainer: pl.Trainer, data: StackData) -> None:
        """Raise ValueError if validation rows decide and cannot."""

    def open(self, trainer: pl.Trainer, module: SeedLoRAModule, data: StackData) -> None:
        """Begin the run in its folder, or go on with the one that is there; ValueError if that cannot be."""

    def holding_tested(self, module: SeedLoRAModule) -> AbstractContextManager[None]:
        """Have the module hold and score, inside, all that a test scores, and what is compared beside it."""


class Clock(PhaseClock, Protocol):
    """Measure the phases of a fit, and how long a micro-batch takes."""

    @property
    def seconds(self) -> float:
        """Return the seconds of one micro-batch."""


@dataclass(frozen=True)
class Parts:
    """What ``train.py`` puts together.

    Args:
        ensemble: the callback class that runs the ensemble.
        data: the base class of data modules; ``--data NAME`` takes its subclasses.
        default_data: the one used when none is named.
        progress: makes the progress bar.
        logger: makes the metrics logger from its file; it can ``rewind(step)``.
        throughput: makes the callback that logs the speed; it knows the ``seconds`` of a micro-batch.
        prompts: the prompt styles, for ``--evaluate``.
        generate: makes the rows of generated tasks, for ``--evaluate``.
    """

    ensemble: type[EnsembleCallback]
    data: type[pl.LightningDataModule]
    default_data: str
    progress: Callable[[], pl.Callback]
    logger: Callable[[Path], Any]
    throughput: Callable[[], Clock]
    prompts: Prompts
    generate: Generate


#: What undoes the options of a run that say what is scored by generation.
NO_TASKS = (
    "--evaluate=",
    "--evaluate_lm_eval=",
    "--evaluate_limit=null",
    "--evaluate_task_path={}",
    "--evaluate_max_new_tokens=null",
)


class _Parser(LightningArgumentParser):
    """Our groups alone in the help, a hint for a misspelt option, and one line per error."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = plain_message(message)
        if word := re.search(r"[Uu]nrecognized arguments: ([^-\s]\S*)", message):
            message = (
                f"unexpected word '{word[1]}'; an option takes one word, a list is '[1,2]', the one command is test"
            )
        elif unknown := re.search(r"(?:[Uu]nrecognized arguments: |Key ')-*([\w.]+)", message):
            meant = closest(unknown[1], self._names())
            message = f"unknown option --{unknown[1]}; " + (f"did you mean --{meant}?" if meant else "see --help")
        raise UsageError(message) from ex

    def format_help(self) -> str:
        shown = [USAGE]
        for title, names, text in option_groups(self):
            if title != "options" and not names[0].startswith("--trainer"):
                shown.append(text)
        trainer = ", ".join(f"--trainer.{name}" for name in TRAINER_SHOWN)
        shown.append(
            f"Every argument of Lightning's Trainer is an option too: {trainer}, ...\n"
            "--config FILE reads options from YAML; --print_config shows all options with their values.\n"
            "--data NAME chooses a data module, --data.help NAME shows its options.\n"
        )
        return "\n".join(shown)

    def _names(self) -> list[str]:
        return [option.lstrip("-") for option in (*SHORT, *option_names(self))]


class SeedLoRACLI(LightningCLI):
    """LightningCLI with the ensemble as its own group of options."""

    def __init__(self, parts: Parts, args: Sequence[str]) -> None:
        self.parts, self.throughput = parts, parts.throughput()
        super().__init__(
            SeedLoRAModule,
            parts.data,
            subclass_mode_data=True,
            run=False,
            # Named first and not set as a default: a default's options would go on to the module that replaces it.
            args=["--data", parts.default_data, *args],
            parser_class=_Parser,
            save_config_callback=None,
            trainer_defaults={**TRAINER_DEFAULTS, "callbacks": [parts.progress()]},
            seed_everything_default=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the ensemble."""
        parser.add_lightning_class_args(self.parts.ensemble, "ensemble")
        scores = parser.add_argument_group("Scores by generation, after training")
        add, some = scores.add_argument, {"metavar": "N", "type": int | None, "default": None}
        add("--evaluate", type=str, default="", metavar="A,B", help=f"tasks: {', '.join(TASKS)}")
        add("--evaluate_limit", **some, help="only the first items of each")
        add("--evaluate_task_path", type=dict[str, str], default={}, metavar="{}", help="files of tasks, by task")
        add("--evaluate_max_new_tokens", **some, help="default: the protocol's")
        add("--evaluate_batch_size", type=int, default=16, metavar="N", help="items in one forward")
        add("--evaluate_execute_code", type=bool, default=False, help="run code, inside bubblewrap")
        add("--evaluate_lm_eval", type=str, default="", metavar="A,B", help="tasks of lm-evaluation-harness")
        add(
            "--evaluate_lm_eval_path",
            type=Path | None,
            default=None,
            metavar="DIR",
            help="YAML files of your own tasks",
        )

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
            known = sorted(kind.__name__ for kind in _concrete(self.parts.data))
            meant = closest(name[1], known)
            hint = f"did you mean {meant}? " if meant else ""
            return f"unknown data module '{name[1]}'; {hint}data modules are {', '.join(known)}"
        return message

    @property
    def callback(self) -> EnsembleCallback:
        """Return the callback that runs the ensemble."""
        callback: EnsembleCallback = self.config_init.ensemble
        return callback

    @property
    def ensemble(self) -> Ensemble:
        """Return what is trained, fused and compared."""
        return self.callback.ensemble

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """A trainer for the next stack of seeds, with its metrics file unless a logger was chosen."""
        options = self.config_init.trainer
        # Lightning adds to the list that it is given, also when it makes the next trainer.
        chosen = options.callbacks or []
        # The clock comes before the ensemble, which merges when training ends; those of the defaults come after it.
        kwargs["callbacks"] = [self.throughput, *(chosen if isinstance(chosen, list) else [chosen])]
        if options.enable_progress_bar is False:  # Lightning adds the defaults itself, and refuses a bar then
            self.trainer_defaults["callbacks"] = []
        kwargs["strategy"] = choose_strategy(options.strategy, accelerator=options.accelerator)
        self.metrics = None
        if options.logger in (None, True):
            self.metrics = kwargs["logger"] = self.parts.logger(self.ensemble.metrics_path)
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, TypeError) as error:
            raise UsageError(f"Lightning's Trainer refuses these options: {error}") from error


def _concrete(kind: type) -> list[type]:
    """The subclasses that can be made, at any depth."""
    children: list[type] = kind.__subclasses__()
    below = [found for child in children for found in _concrete(child)]
    return below if inspect.isabstract(kind) else [kind, *below]


def options_of_finished_run(argv: Sequence[str]) -> list[str]:
    """The options of ``test``: those of the run in ``--ensemble.dirpath``, then those given."""
    given = values_of(argv, "--ensemble.dirpath")
    if not given:
        raise UsageError("test needs the run to score: python train.py test --ensemble.dirpath RUN")
    file = Path(given[-1]) / "config.yaml"
    if not file.is_file():
        raise UsageError(f"{given[-1]} holds no run: it has no config.yaml")
    check_config(file, "; --resume with the options of the run writes it again")
    # Tasks that are given here take the place of the run's, with all that was said about those.
    anew = any(re.match(r"--evaluate(_lm_eval)?(=|$)", word) for word in argv)
    return ["--config", str(file), *(NO_TASKS if anew else ()), *argv, "--ensemble.resume=true"]


def values_of(argv: Sequence[str], option: str) -> list[str]:
    """What an option is given, as ``--option VALUE`` or ``--option=VALUE``."""
    joined = [word.partition("=")[2] for word in argv if word.startswith(f"{option}=")]
    return joined + [value for word, value in pairwise(argv) if word == option]


def check_config(file: Path, instead: str = "") -> None:
    """Raise UsageError if a file is there that holds no options; the parser would not name it."""
    if not file.is_file():
        return
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {error}{instead}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{file} cannot be read: it holds no options{instead}")


def expand_short_options(argv: Sequence[str]) -> list[str]:
    """``--merge X`` is ``--ensemble.merge X``; ``--resume`` alone is ``--ensemble.resume true``, and so on."""
    long = []
    for i, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name in SHORT:
            argument = SHORT[name] + equals + value
            following = argv[i + 1] if i + 1 < len(argv) else "--"
            if name in BARE and not equals and following.startswith("-"):
                argument += f"={BARE[name]}"
        long.append(argument)
    return long
