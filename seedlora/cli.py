"""The command line: LightningCLI without a subcommand, one run from plan to scores.

``train.py`` hands over the classes, so that the library imports neither callbacks nor data modules.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import yaml
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console

from seedlora.adapter import CONFIG_NAME, AdapterError, adapter_sha256
from seedlora.atomic import atomic_file
from seedlora.card import CARD_NAME
from seedlora.evaluation.answering import DEFAULT_STYLE, Prompts, Scored, candidate
from seedlora.evaluation.command import make_sandbox, score, score_with_harness, task_runs
from seedlora.evaluation.generate import StackGenerator
from seedlora.evaluation.harness import check_harness
from seedlora.evaluation.run import TaskRun
from seedlora.evaluation.sandbox import Sandbox
from seedlora.evaluation.tasks import TASKS, Generate, check_tasks
from seedlora.module import DivergedError, SeedLoRAModule, StoppedError
from seedlora.plan import PeakMemory, RunPlan, run_plan, timed, write_cost
from seedlora.report import model_commands, next_commands, results_table, verdict
from seedlora.report.facts import COST_NAME
from seedlora.report.page import write_report
from seedlora.report.results import ALL_CONTROLS, BASE
from seedlora.spelling import closest
from seedlora.strategies import ProcessWatch, choose_strategy, is_partitioned, is_sharded, lost_connection, prepare

USAGE = """\
Train LoRA replicas of one task with different seeds as one stack, and fuse them into one adapter.

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
#: What values are, for people.
KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "Sequence": 'a list such as "[1,2]"',
    "Mapping": 'a mapping such as "{name: value}"',
}
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

    ensemble: type[pl.Callback]
    data: type[pl.LightningDataModule]
    default_data: str
    progress: Callable[[], pl.Callback]
    logger: Callable[[Path], Any]
    throughput: Callable[[], Any]
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
#: In the folder of a run as long as there is something left to do: what ``--resume`` alone looks for.
UNFINISHED_NAME = "unfinished"


class UsageError(ValueError):
    """A request that cannot be carried out; the message is one sentence for the user."""


class _Parser(LightningArgumentParser):
    """Our groups alone in the help, a hint for a misspelt option, and one line per error."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = _plain(message)
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
        for group in self._action_groups:
            title = str(group.title or "")
            names = [name for action in group._group_actions for name in action.option_strings]
            if title == "options" or not names or names[0].startswith("--trainer"):
                continue
            formatter = self._get_formatter()
            formatter.start_section(title)
            formatter.add_arguments(group._group_actions)
            formatter.end_section()
            shown.append(formatter.format_help())
        trainer = ", ".join(f"--trainer.{name}" for name in TRAINER_SHOWN)
        shown.append(
            f"Every argument of Lightning's Trainer is an option too: {trainer}, ...\n"
            "--config FILE reads options from YAML; --print_config shows all options with their values.\n"
            "--data NAME chooses a data module, --data.help NAME shows its options.\n"
        )
        return "\n".join(shown)

    def _names(self) -> list[str]:
        shown = (option for action in self._actions for option in action.option_strings)
        return [option.lstrip("-") for option in (*SHORT, *shown)]


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
    def ensemble(self) -> Any:
        """The callback that runs the ensemble."""
        return self.config_init.ensemble

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """A trainer for the next stack of seeds, with its metrics file unless a logger was chosen."""
        options = self.config_init.trainer
        # Lightning adds to the list that it is given, also when it makes the next trainer.
        chosen = options.callbacks or []
        # The clock comes before the ensemble, which fuses when training ends; those of the defaults come after it.
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


def main(parts: Parts, argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0; 2 for a request that cannot be carried out; 1 for a run that was interrupted or could not
        write. The last two say so in one sentence on stderr; any other error is a fault of ours and shows its
        traceback.
    """
    with _leaving_on_sigterm():
        return _main(parts, argv)


def _main(parts: Parts, argv: Sequence[str] | None) -> int:
    started = time.monotonic()
    _hush()
    console = Console(soft_wrap=not sys.stdout.isatty(), quiet=rank_zero_only.rank != 0)
    words = list(sys.argv[1:] if argv is None else argv)
    finished, planning = words[:1] == ["test"], "--plan" in words
    words = [word for word in words if word != "--plan"]
    try:
        words = _long_options(_of_finished_run(words[1:]) if finished else words)
        for file in _values(words, "--config"):
            _check_config(Path(file))
        cli = SeedLoRACLI(parts, words)
        if finished and (pending := cli.ensemble.pending):
            raise UsageError(f"{cli.ensemble.dirpath} is not finished: seed {pending[0]} is not trained; use --resume")
        if finished and (lacking := cli.ensemble.comparison.lacks(cli.ensemble.folder.selection or {})):
            raise UsageError(f"{cli.ensemble.dirpath} was fused without {lacking}; --resume instead of test adds it")
        if finished and (otherwise := cli.ensemble.fused_otherwise) is not None:
            made, asked = otherwise
            does = "removes that" if cli.ensemble.rule is None else f"fuses it by {asked}"
            raise UsageError(f"{cli.ensemble.dirpath} was fused by {made}; --resume instead of test {does}")
        asked = _tasks(cli, console)
        plan = _prepare(cli, console, planning=planning, finished=finished)
    except (ValueError, OSError) as error:
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        print(f"train.py: error: {_plain(reason)}", file=sys.stderr)  # noqa: T201
        return 2
    watch = ProcessWatch(cli.trainer, lambda reason: _stopped(cli, reason))
    if cli.trainer.world_size > 1:
        watch.start()
    try:
        if planning:
            _measure(cli, plan, console)
            return 0
        if not finished:
            _train(cli, console)
        _test(cli, console)
        watch.finish()
        code = _evaluate(cli, asked, console)
        _report(cli, console)
        if cli.trainer.is_global_zero and not cli.trainer.fast_dev_run:
            (cli.ensemble.dirpath / UNFINISHED_NAME).unlink(missing_ok=True)
    except (KeyboardInterrupt, SystemExit, OSError, StoppedError) as error:
        # Lightning ends the process itself when it is interrupted.
        told = isinstance(error, OSError | StoppedError) or isinstance(getattr(error, "code", None), str)
        _stopped(cli, _one_line(str(error)) if told else "interrupted", diverged=isinstance(error, DivergedError))
        return 1
    except AdapterError as error:
        again = "without that folder --resume makes it anew"
        print(f"train.py: error: {_one_line(str(error))}; {again}", file=sys.stderr)  # noqa: T201
        return 1
    except RuntimeError as error:
        if not lost_connection(error):
            raise
        time.sleep(1)  # for the watch, which knows more
        _stopped(cli, "the connection to another process was lost")
        return 1
    console.print(f"[dim]{time.monotonic() - started:.0f} s in all; everything is in[/] {cli.ensemble.dirpath}")
    return code


def _stopped(cli: SeedLoRACLI, reason: str, *, diverged: bool = False) -> None:
    """Say why, and what to do next. A report is not written now: who stops a run waits, and a disk may be full."""
    run, rank = cli.ensemble.dirpath, ""
    if cli.trainer.world_size > 1:
        rank = f" (process {cli.trainer.global_rank})"
    words = [f"train.py: stopped{rank}: {reason}"]
    if (run / UNFINISHED_NAME).is_file():
        again = f"repeat the command with --resume --ensemble.dirpath {run}"
        if diverged:
            again = "--resume takes another on_divergence there; another learning_rate needs another --ensemble.dirpath"
        words += ["what was saved before is whole", again, f"python -m seedlora report {run} shows how far it came"]
    print("; ".join(words), file=sys.stderr, flush=True)  # noqa: T201


@contextmanager
def _leaving_on_sigterm() -> Iterator[None]:
    """A SIGTERM ends the run as Ctrl-C does, wherever the ensemble does not save a checkpoint first."""

    def leave(*_: object) -> None:
        raise SystemExit("terminated by SIGTERM")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _prepare(cli: SeedLoRACLI, console: Console, *, planning: bool, finished: bool) -> RunPlan:
    """Everything that can go wrong before the expensive work: options, folder, model, data; then print the plan."""
    trainer, module, data, ensemble = cli.trainer, cli.model, cli.datamodule, cli.ensemble
    if (cli.config.evaluate or cli.config.evaluate_lm_eval) and module.trains_all:
        raise UsageError(
            "--evaluate holds all adapters at once, which whole models are too large for; score them one by one after "
            "the run: python -m seedlora evaluate --base-model RUN/fused --task TASK"
        )
    ensemble.share(trainer)
    with console.status("Looking at the base model (the embedded one is converted on first use) ..."):
        module.check()
        prepare(trainer, **module.unsplit)
        data.tokenizer = module.tokenizer
    data.trainer = trainer
    data.prepare_data()
    data.setup("fit")
    ensemble.check_validation(trainer, data)
    ensemble.choose_stack_size(trainer, module, data)
    if cli.metrics is not None:
        cli.metrics.path = ensemble.metrics_path
    plan = run_plan(trainer, module, data, ensemble)
    if not planning:
        ensemble.open(trainer, module, data)
    if trainer.is_global_zero and not (planning or finished or trainer.fast_dev_run):
        (ensemble.dirpath / UNFINISHED_NAME).touch()
        config = cli.config.clone()
        config.ensemble.resume = False  # the file starts another run as well
        with atomic_file(ensemble.dirpath / "config.yaml") as file:
            file.write_text(cli.parser.dump(config), encoding="utf-8")
        write_cost(ensemble.dirpath / COST_NAME, plan, getattr(data, "libraries", ()))
    console.print(plan.table())
    return plan


def _measure(cli: SeedLoRACLI, plan: RunPlan, console: Console, steps: int = 3) -> None:
    """Train a few steps for their time and memory, without a trace; the first one warms up.

    Loading is no part of the memory: while files are read, their pages count that can be dropped at any time.
    """
    ensemble, data = cli.ensemble, cli.datamodule
    if not ensemble.next_names:
        console.print("All is trained already, so there was nothing to measure.")
        return
    accumulate = cli.trainer.accumulate_grad_batches
    trainer = cli.instantiate_trainer(fast_dev_run=(steps + 1) * accumulate)
    trainer.limit_val_batches = 0
    peak = PeakMemory(trainer.strategy.root_device)
    trainer.callbacks.append(LambdaCallback(on_train_start=lambda *_: peak.forget()))
    trainer.fit(cli.model, datamodule=data)
    seconds = cli.throughput.seconds * accumulate
    total = timedelta(seconds=round(seconds * plan.steps * plan.passes))
    what = "training the seeds" if ensemble.trains_controls else "training"
    console.print(
        f"Measured: {seconds:.3g} s a step of {min(len(plan.seeds), ensemble.stack_size or len(plan.seeds))} seeds, so "
        f"about {total} (h:mm:ss) of {what}; memory {peak.bytes / 2**30:.2f} GiB, where the estimate is "
        f"{plan.memory.total / 2**30:.2f} GiB. Nothing was written.",
        highlight=False,
    )


def _train(cli: SeedLoRACLI, console: Console) -> None:
    """Train what is not trained yet: seeds, one stack after the other, the last one fuses all; then controls."""
    ensemble, first = cli.ensemble, True
    if cli.trainer.fast_dev_run:
        if ensemble.next_names:
            cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        return
    if not ensemble.pending:
        # Perhaps this is not the method, or the choice, that they were fused by.
        first = False
        if ensemble.rule is not None and cli.datamodule.rows["val"] and cli.trainer.limit_val_batches:
            cli.trainer.loggers = []  # what is scored now is no part of the training's curves
            cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
        elif cli.trainer.is_global_zero:
            ensemble.fuse()
    while ensemble.pending or ensemble.pending_controls:
        control, given = None, cli.config_init.trainer
        if not ensemble.pending:
            control, first = ensemble.pending_controls[0], False
            console.print(f"Training the control {control}")
        limits = ensemble.control_limits(max_epochs=given.max_epochs, max_steps=given.max_steps) if control else {}
        trainer = cli.trainer if first else cli.instantiate_trainer(**limits)
        cli.trainer, first = trainer, False
        checkpoint = ensemble.ckpt_path
        if checkpoint is not None:
            newest = ensemble.folder.saved(ensemble.next_names)[0]
            damaged = f", as {newest.name} is damaged" if newest != checkpoint else ""
            console.print(f"Going on from {checkpoint}{damaged}")
        if cli.metrics is not None:
            cli.metrics.rewind(ensemble.ckpt_step)
        device = trainer.strategy.root_device
        with (
            timed(ensemble.dirpath / COST_NAME, device, cli.throughput, control)
            if trainer.is_global_zero
            else nullcontext()
        ):
            trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, weights_only=True)


def _test(cli: SeedLoRACLI, console: Console) -> None:
    """Score base, seeds, soup and fused adapter on the same items, and say what to do with the result."""
    ensemble = cli.ensemble
    if cli.trainer.fast_dev_run:
        return
    for seed, reason in ensemble.excluded.items():
        console.print(f"Seed {seed} was left out: {reason}.")
    if not cli.datamodule.rows["test"]:
        console.print("There are no test rows, so nothing was scored.")
    else:
        cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
        console.print()
        method = ensemble.method_name if ensemble.rule is not None else ""
        console.print(results_table(ensemble.results, method=method))
        console.print(verdict(ensemble.results), highlight=False)
    if ensemble.rule is not None and cli.model.trains_all:
        console.print("\n" + model_commands(ensemble.fused_path.resolve()), highlight=False, markup=False)
    elif ensemble.rule is not None:
        fused, full = ensemble.fused_path.resolve(), bool(cli.model.full_modules)
        rank = json.loads((fused / CONFIG_NAME).read_text(encoding="utf-8"))["r"]
        commands = next_commands(base_model=cli.model.base_path, adapter=fused, rank=rank, serve=not full)
        console.print("\n" + commands, highlight=False, markup=False)
        if full:
            why = "no server loads an adapter with full weights beside it; for a whole model, add --into-base"
            console.print(f"# {why} to the command in {fused / CARD_NAME}", highlight=False, markup=False)
        if note := cli.model.base_note:
            console.print(note, highlight=False, markup=False)


def _concrete(kind: type) -> list[type]:
    """The subclasses that can be made, at any depth."""
    children: list[type] = kind.__subclasses__()
    below = [found for child in children for found in _concrete(child)]
    return below if inspect.isabstract(kind) else [kind, *below]


@dataclass(frozen=True)
class _Tasks:
    """What is scored by generation: tasks of ours, and the names of the harness's with its table of them."""

    runs: Sequence[TaskRun] = ()
    sandbox: Sandbox | None = None
    harness: Sequence[str] = ()
    manager: Any = None


def _tasks(cli: SeedLoRACLI, console: Console) -> _Tasks:
    """The tasks that are scored after training, read before it; one that is trained on, by the run's own test split."""
    config = cli.config
    names, harness = ([name for name in text.split(",") if name] for text in (config.evaluate, config.evaluate_lm_eval))
    own = {f"data.{key}": value for key, value in getattr(cli.datamodule, "hparams", {}).items()}
    trained_on = str(own.get("data.task"))
    if not (names or harness):
        return _Tasks()
    if config.evaluate_batch_size < 1:
        raise UsageError(f"--evaluate_batch_size must be at least 1, got {config.evaluate_batch_size}")
    check_tasks(names)
    known = TASKS[trained_on].made_of if trained_on in TASKS else ()
    if seen := [name for name in (*names, *harness) if name.startswith(known)]:
        raise UsageError(
            f"scoring {seen[0]} after training on {trained_on}, whose rows are variants of its test items, would "
            "measure what was seen; evaluate other tasks, or train on other data"
        )
    paths = [f"{task}={path}" for task, path in config.evaluate_task_path.items()]

    def generate(task: str, run: Mapping[str, Any] | None) -> Iterable[Mapping[str, Any]]:
        return cli.parts.generate(task, own if run is None and task == trained_on else run)

    try:
        with console.status(f"Reading {', '.join((*names, *harness))} ..."):
            runs = task_runs(names, paths, config.evaluate_limit, config.evaluate_max_new_tokens, generate)
            sandbox = make_sandbox(runs, execute=config.evaluate_execute_code, trust=False)
            manager = check_harness(harness, config.evaluate_lm_eval_path) if harness else None
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.filename:
            raise
        raise UsageError(_named_here(str(error))) from None
    return _Tasks(runs, sandbox, harness, manager)


def _named_here(message: str) -> str:
    """What is said of options of ``python -m seedlora evaluate``, with the names that they have here."""
    message = re.sub(r"--task-path (\w+)=(\S+)", r"--evaluate_task_path '{\1: \2}'", message)
    message = message.replace("--task ", "--evaluate ")
    message = message.replace("--without-sandbox", "python -m seedlora evaluate --without-sandbox, after the run")
    names = r"--(limit|max-new-tokens|task-path|execute-code)\b"
    return re.sub(names, lambda found: f"--evaluate_{found[1].replace('-', '_')}", message)


def _evaluate(cli: SeedLoRACLI, asked: _Tasks, console: Console) -> int:
    """Score base, seeds, soup and fused adapter on tasks, stacked over the model in memory.

    Answers of an older fusion are replaced. Returns the exit code: what fails here costs neither run nor report.
    """
    module, ensemble, trainer = cli.model, cli.ensemble, cli.trainer
    if not (asked.runs or asked.harness) or trainer.fast_dev_run or not trainer.is_global_zero:
        return 0
    module.setup("test")
    if is_sharded(module.model) or is_partitioned(module.model):
        again = f"python -m seedlora evaluate --adapter {ensemble.fused_path} --task ..."
        console.print(f"not scored, the model is split over processes: {again}")
        return 0
    # Lightning leaves the model on the CPU.
    module.to(trainer.strategy.root_device)
    ensemble.on_test_start(trainer, module)
    for label, make in ensemble.beside(module.device).items():
        module.load(label, make())
        module.scored[label] = label
    mixtures, module.mixtures = module.mixtures, {}
    data = cli.datamodule
    record = data.prompt_record() if hasattr(data, "prompt_record") else DEFAULT_STYLE
    generator = StackGenerator(
        module.model.get_base_model(),
        module.tokenizer,
        route=module.stack.route,
        frozen=module.stack.frozen,
        adapters=module.scored,
        mixtures=mixtures,
        batch_size=cli.config.evaluate_batch_size,
    )
    files = {label: adapter_sha256(folder) for label, folder in ensemble.folders.items()}
    made = [label for label in module.scored if label not in (BASE, *files)]
    weights: dict[str, Any] = dict.fromkeys(module.scored) | files
    weights |= {label: module.stack.loaded_sha256(label) for label in made}
    weights |= {label: [weights[member] for member in members] for label, members in mixtures.items()}
    candidates = [candidate(label, record, cli.parts.prompts, weights_sha256=weights[label]) for label in weights]
    dtype = str(module.dtype_base).removeprefix("torch.")
    settings = {"generator": "transformers", "base_model": module.base_path, "dtype": dtype}
    settings["quantization"] = module.hparams["quantization"]
    scored, folder = Scored(generator, candidates, settings), ensemble.dirpath / "evaluation"
    adapters = replace(scored, candidates=[c for c in candidates if c.name not in mixtures])
    limit = cli.config.evaluate_limit
    try:
        if asked.runs:
            method = ensemble.method_name
            score(scored, asked.runs, folder, console, sandbox=asked.sandbox, method=method, replace=True)
        if asked.harness:
            score_with_harness(adapters, asked.harness, asked.manager, folder, console, limit=limit)
    except (ValueError, OSError) as error:
        print(f"train.py: not scored: {_one_line(str(error))}", file=sys.stderr)  # noqa: T201
        return 2 if isinstance(error, ValueError) else 1
    return 0


def _report(cli: SeedLoRACLI, console: Console) -> None:
    """Write the report; a fault in it must not cost the run, which is whole by now."""
    run = cli.ensemble.dirpath
    if cli.trainer.fast_dev_run or not cli.trainer.is_global_zero:
        return
    try:
        with console.status("Writing the report ..."):
            found = write_report(run)
    except Exception as error:
        reason = _one_line(f"{type(error).__name__}: {error}")
        print(f"train.py: no report: {reason}; the run is whole; try: python -m seedlora report {run}", file=sys.stderr)  # noqa: T201
    else:
        for sentence in found["advice"]["sentences"]:
            console.print(sentence, highlight=False, markup=False)
        if (better := found["advice"]["better"]) is not None:
            console.print(f"The better adapter is in {run / better}", highlight=False, soft_wrap=True)
        console.print(f"report: {run / 'report.html'}", highlight=False, soft_wrap=True)


def _of_finished_run(argv: Sequence[str]) -> list[str]:
    """The options of ``test``: those of the run in ``--ensemble.dirpath``, then those given."""
    given = _values(argv, "--ensemble.dirpath")
    if not given:
        raise UsageError("test needs the run to score: python train.py test --ensemble.dirpath RUN")
    file = Path(given[-1]) / "config.yaml"
    if not file.is_file():
        raise UsageError(f"{given[-1]} holds no run: it has no config.yaml")
    _check_config(file, "; --resume with the options of the run writes it again")
    # Tasks that are given here take the place of the run's, with all that was said about those.
    anew = any(re.match(r"--evaluate(_lm_eval)?(=|$)", word) for word in argv)
    return ["--config", str(file), *(NO_TASKS if anew else ()), *argv, "--ensemble.resume=true"]


def _values(argv: Sequence[str], option: str) -> list[str]:
    """What an option is given, as ``--option VALUE`` or ``--option=VALUE``."""
    joined = [word.partition("=")[2] for word in argv if word.startswith(f"{option}=")]
    return joined + [value for word, value in pairwise(argv) if word == option]


def _check_config(file: Path, instead: str = "") -> None:
    """Raise UsageError if a file is there that holds no options; the parser would not name it."""
    if not file.is_file():
        return
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {error}{instead}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{file} cannot be read: it holds no options{instead}")


def _long_options(argv: Sequence[str]) -> list[str]:
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


def _hush() -> None:
    """Keep what libraries say about themselves out of the output: the plan and the tables say what matters."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # DeepSpeed sets its own level when it is imported, but keeps filters.
    # PEFT imports bitsandbytes, which says what would make it faster.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    for name in ("is_gradient_checkpointing", "gradient_checkpointing_enable", "isinstance(treespec, LeafSpec)"):
        message = f"`{name}` is deprecated"
        warnings.filterwarnings("ignore", message=re.escape(message))
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="lightning.pytorch.cli")
    # We clip, see seedlora.strategies; and what DeepSpeed calls in torch is renamed there.
    warnings.filterwarnings("ignore", message="Since DeepSpeed handles gradient clipping internally")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    warnings.filterwarnings("ignore", message=r"torch\.distributed\.nn\.functional\.all_gather is deprecated")
    warnings.filterwarnings("ignore", message="The '.*_dataloader' does not have many workers")


def _plain(message: str) -> str:
    """One sentence of what jsonargparse says about a value: the cause alone, with the option by its name."""
    message, option, given = _one_line(message), "", ""
    while True:
        if found := re.match(r'Parser key "([\w.]+)": (.*)', message):
            option, message = f"{option}.{found[1]}".strip("."), found[2]
        elif found := re.search(r"Errors: - (.*) - Expected a <class 'NoneType'>.*?Given value: (.*)", message):
            message, given = found[1], found[2]
        else:
            break
    if kind := re.fullmatch(r"Expected a <class '(?:.*\.)?(\w+)'>(?:\. Got value: (.*))?", message):
        return f"--{option} takes {KINDS.get(kind[1], kind[1])}, got {kind[2] or given}"
    if choices := re.findall(r"typing\.Literal\[(.*?)\]", message):
        return f"--{option} takes one of {', '.join(choices)}, got {given}"
    if option and message.startswith("--"):  # the parser of a data module has been here
        return f"--{option}.{message[2:]}"
    return f"--{option}: {message}" if option else message


def _one_line(message: str) -> str:
    return " ".join(message.split())
