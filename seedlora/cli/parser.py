"""The options of ``train.py``."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import yaml
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from seedlora.callbacks import EnsembleProgressBar, JSONLinesLogger, SeedEnsembleCallback, Throughput
from seedlora.cli.argparse_internals import option_groups, option_names
from seedlora.cli.errors import UsageError, one_line, plain_message
from seedlora.cli.option_words import BARE, SHORT
from seedlora.datamodules import InstructionDataModule
from seedlora.distributed.strategies import choose_strategy
from seedlora.evaluation.tasks import TASKS
from seedlora.names import FROM_PYTHON, UNFINISHED_NAME
from seedlora.run.ensemble import Ensemble
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
  python train.py --evaluate gsm8k --evaluate.limit 100    then score all adapters on GSM8K
  python train.py test --ensemble.dirpath RUN          score a finished run again, without training
"""
#: Options that take a list of names or numbers, which may be given as ``A,B`` too.
LISTS = ("--ensemble.seeds", "--model.target_modules", "--model.modules_to_save")
_COMMA_LIST = re.compile(r"[\w.]+(, ?[\w.]+)+")
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
TRAINER_SHOWN = ("max_epochs", "max_steps", "accelerator", "devices", "strategy", "accumulate_grad_batches")


#: What undoes the options of a run that say what is scored by generation.
NO_TASKS = (
    "--evaluate.task=",
    "--evaluate.lm_eval=",
    "--evaluate.limit=null",
    "--evaluate.task_path={}",
    "--evaluate.max_new_tokens=null",
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

    def __init__(self, args: Sequence[str]) -> None:
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
        """A trainer for the next stack of seeds, with its metrics file unless a logger was chosen."""
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
        self.metrics = None
        if options.logger in (None, True):
            self.metrics = kwargs["logger"] = JSONLinesLogger(self.ensemble.metrics_path)
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, TypeError, ValueError, ImportError) as error:
            raise UsageError(f"Lightning's Trainer refuses these options: {one_line(str(error))}") from error


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
    anew = any(re.match(r"--evaluate(\.task|\.lm_eval)?(=|$)", word) for word in argv)
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
    if why := found.get(FROM_PYTHON):
        raise UsageError(f"{file} records a run from Python, which train.py cannot start: {why}")
    data = found.get("data")
    kind = str(data.get("class_path")) if isinstance(data, dict) else ""
    if kind.startswith("datamodules."):
        raise UsageError(f"{file}: data.class_path {kind} is called seedlora.{kind} now")
    if isinstance(found.get("evaluate"), str):
        raise UsageError(f"{file}: evaluate is called evaluate.task now")
    if old := [key for key in found if str(key).startswith("evaluate_")]:
        raise UsageError(f"{file}: {old[0]} is called {old[0].replace('_', '.', 1)} now")


def expand_short_options(argv: Sequence[str]) -> list[str]:
    """``--merge X`` is ``--ensemble.merge X``; ``--resume`` alone ``--ensemble.resume true``; a list may be ``1,2``."""
    long: list[str] = []
    for i, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name in SHORT:
            argument = SHORT[name] + equals + value
            following = argv[i + 1] if i + 1 < len(argv) else "--"
            if name in BARE and not equals and following.startswith("-"):
                argument += f"={BARE[name]}"
        elif name in LISTS and _COMMA_LIST.fullmatch(value):
            argument = f"{name}=[{value}]"
        elif long and long[-1] in LISTS and _COMMA_LIST.fullmatch(argument):
            argument = f"[{argument}]"
        long.append(argument)
    return long
