"""Do what ``train.py`` was asked for: LightningCLI without a subcommand, one run from plan to scores."""

from __future__ import annotations

import json
import logging
import re
import shlex
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from enum import Enum
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.text import Text

from seedlora.adapters.adapter import CONFIG_NAME, AdapterError
from seedlora.adapters.model_card import CARD_NAME
from seedlora.adapters.server_commands import model_commands, next_commands
from seedlora.cli.after_training import asked_tasks, evaluate_run
from seedlora.cli.errors import UsageError, one_line, refuse
from seedlora.cli.parser import SeedLoRACLI
from seedlora.cli.plan_measurement import measure_plan
from seedlora.distributed.process_watch import ProcessWatch, is_lost_connection
from seedlora.distributed.strategies import prepare_strategy
from seedlora.model.loading import BaseModelError
from seedlora.names import UNFINISHED_NAME
from seedlora.report.terminal import told_report
from seedlora.run.budget import replica_share
from seedlora.run.conclusion import conclusion, left_out
from seedlora.run.cost import earlier_seconds, timed, write_cost
from seedlora.run.memory import choose_stack_size
from seedlora.run.merging import merge_run
from seedlora.run.opening import opening
from seedlora.run.plan import RunPlan, run_plan
from seedlora.run.plan_advice import plan_advice
from seedlora.training.replicas import DivergedError, StoppedError
from seedlora.utils.files import atomic_file
from seedlora.utils.options import name_option
from seedlora.utils.places import without_home
from seedlora.utils.progress import plain_console, show


def run(words: Sequence[str], *, finished: bool, planning: float | None, started: float) -> int:
    """Plan, train, merge, score and report.

    Args:
        words: of the command line, as :func:`seedlora.cli.train_words.read_words` gives them.
        finished: the run was trained before, and is scored again.
        planning: measure a few steps instead, until so many seconds after the start, and write nothing.
        started: when the process began, by the monotonic clock.

    Returns:
        The exit code, as of :func:`seedlora.cli.train.main`.
    """
    with ExitStack() as at_exit:
        return _run(words, at_exit, finished=finished, planning=planning, started=started)


def _run(words: Sequence[str], at_exit: ExitStack, *, finished: bool, planning: float | None, started: float) -> int:
    _hush()
    console = plain_console(soft_wrap=not sys.stdout.isatty(), quiet=rank_zero_only.rank != 0)
    try:
        cli = SeedLoRACLI(words)
        if finished and (pending := cli.ensemble.pending):
            raise UsageError(f"{cli.ensemble.dirpath} is not finished: {pending[0]} is not trained; use --resume")
        if finished and (lacking := cli.ensemble.comparison.lacks(cli.ensemble.folder.selection)):
            raise UsageError(f"{cli.ensemble.dirpath} was merged without {lacking}; --resume instead of test adds it")
        if finished and (otherwise := cli.ensemble.merged_otherwise) is not None:
            does = "removes that" if cli.ensemble.rule is None else f"merges it by {otherwise.asked}"
            raise UsageError(f"{cli.ensemble.dirpath} was merged by {otherwise.made}; --resume instead of test {does}")
        asked = asked_tasks(cli, console)
        at_exit.callback(cli.ensemble.folder.leave)
        plan = _prepare(cli, console, planning=planning, finished=finished)
    except (ValueError, OSError) as error:
        return refuse(error)
    earlier = 0.0 if finished else earlier_seconds(cli.ensemble.dirpath)
    watch = ProcessWatch(cli.trainer, lambda reason: _stopped(cli, reason))
    if cli.trainer.world_size > 1:
        watch.start()
    try:
        if planning is not None:
            measure_plan(cli, plan, console, until=started + planning)
            return 0
        if finished:
            cli.trainer.loggers = []  # the run's own test is in its log
        else:
            _train(cli, console)
        _test(cli, console)
        watch.finish()
        code = evaluate_run(cli, asked, console)
        _report(cli, console)
        if cli.trainer.is_global_zero and not cli.trainer.fast_dev_run:
            (cli.ensemble.dirpath / UNFINISHED_NAME).unlink(missing_ok=True)
    except (KeyboardInterrupt, SystemExit, OSError, StoppedError) as error:
        # Lightning ends the process itself when it is interrupted.
        told = isinstance(error, OSError | StoppedError) or isinstance(getattr(error, "code", None), str)
        _stopped(cli, one_line(str(error)) if told else "interrupted", diverged=isinstance(error, DivergedError))
        return 1
    except MisconfigurationException as error:
        _stopped(cli, f"Lightning refuses an option of the Trainer: {one_line(str(error))}")
        return 1
    except BaseModelError as error:
        return refuse(error)
    except AdapterError as error:
        again = "without that folder --resume makes it anew"
        print(f"error: {one_line(str(error))}; {again}", file=sys.stderr)  # noqa: T201
        return 1
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        time.sleep(1)  # for the watch, which knows more
        _stopped(cli, "the connection to another process was lost")
        return 1
    took = time.monotonic() - started
    since = "since it was resumed" if cli.ensemble.options.resume and not finished else "in all"
    before = f", {took + earlier:.0f} s with the training of earlier parts" if earlier else ""
    said = Text(f"{took:.0f} s {since}{before}; everything is in", "dim")
    console.print(said, str(cli.ensemble.dirpath), highlight=False)
    return code


def _stopped(cli: SeedLoRACLI, reason: str, *, diverged: bool = False) -> None:
    """Say why, and what to do next. A report is not written now: who stops a run waits, and a disk may be full."""
    run, rank = cli.ensemble.dirpath, ""
    if cli.trainer.world_size > 1:
        rank = f" (process {cli.trainer.global_rank})"
    words = [f"stopped{rank}: {reason}"]
    if (run / UNFINISHED_NAME).is_file():
        again = f"repeat the command with --resume --ensemble.dirpath {shlex.quote(str(run))}"
        if diverged:
            again = "--resume takes another on_divergence there; another learning_rate needs another --ensemble.dirpath"
        words += ["what was saved before is whole", again, f"{_report_command(run)} shows how far it came"]
    print("; ".join(words), file=sys.stderr, flush=True)  # noqa: T201


def _report_command(run: Path) -> str:
    return shlex.join(["python", "-m", "seedlora", "report", str(run)])


def _prepare(cli: SeedLoRACLI, console: Console, *, planning: float | None, finished: bool) -> RunPlan:
    """Do all that can go wrong before the expensive work: options, folder, model, data; then print the plan."""
    trainer, module, data, ensemble = cli.trainer, cli.model, cli.datamodule, cli.ensemble
    if (cli.config.evaluate.task or cli.config.evaluate.lm_eval) and module.options.is_full_finetuning:
        raise UsageError(
            "--evaluate holds all adapters at once, which whole models are too large for; score them one by one after "
            "the run: python -m seedlora evaluate --base_model RUN/fused --task TASK"
        )
    replica_share(ensemble.options, trainer)
    with console.status("Looking at the base model (the embedded one is converted on first use) ..."):
        module.options.check()
        prepare_strategy(trainer, **module.options.needs_whole_base)
        data.tokenizer = module.tokenizer
    data.trainer = trainer
    data.prepare_data()
    data.setup("fit")
    cli.callback.check_fit(trainer, module, data)
    choose_stack_size(ensemble, trainer, module.options, data)
    ensemble.check_stack()
    plan = run_plan(trainer, module.options, data, ensemble)
    if planning is None:
        if trainer.is_global_zero and not trainer.fast_dev_run:
            ensemble.folder.take(resume=ensemble.options.resume)
        cli.callback.open(trainer, module, data)
    if cli.metrics is not None:
        cli.metrics.path = ensemble.metrics_path
    if trainer.is_global_zero and not (planning is not None or finished or trainer.fast_dev_run):
        (ensemble.dirpath / UNFINISHED_NAME).touch()
        config = _without_enums(cli.config.clone())
        config.ensemble.resume = False  # the file starts another run as well
        with atomic_file(ensemble.dirpath / "config.yaml") as file:
            file.write_text(without_home(cli.parser.dump(config), below=True), encoding="utf-8")
        write_cost(ensemble.dirpath, plan, data.libraries)
    show(console, opening(plan, data, plan_advice(trainer, module.options, data, ensemble)))
    return plan


def _without_enums(value: Any) -> Any:
    """Return options in which the members of enumerations, such as the interval of a Timer, are plain values."""
    if isinstance(value, Namespace):
        for key, inner in vars(value).items():
            setattr(value, key, _without_enums(inner))
    elif isinstance(value, Enum):
        return value.value
    elif isinstance(value, list | dict):
        pairs = enumerate(value) if isinstance(value, list) else value.items()
        for key, inner in list(pairs):
            value[key] = _without_enums(inner)
    return value


def _train(cli: SeedLoRACLI, console: Console) -> None:
    """Train what is not trained yet: seeds, one stack after the other, the last one merges all; then controls."""
    ensemble, first = cli.ensemble, True
    if cli.trainer.fast_dev_run:
        if ensemble.next_names:
            cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        return
    if not ensemble.pending:
        # Perhaps this is not the method, or the choice, that they were merged by.
        first = False
        if ensemble.rule is not None and cli.datamodule.rows["val"] and cli.trainer.limit_val_batches:
            cli.trainer.loggers = []  # what is scored now is no part of the training's curves
            cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
        elif cli.trainer.is_global_zero:
            merge_run(ensemble)
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
        with timed(ensemble.dirpath, device, cli.throughput, control) if trainer.is_global_zero else nullcontext():
            trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, weights_only=True)


def _test(cli: SeedLoRACLI, console: Console) -> None:
    """Score base, seeds, soup and fused adapter on the same items, and say what to do with the result."""
    ensemble = cli.ensemble
    if cli.trainer.fast_dev_run:
        return
    show(console, left_out(ensemble))
    if not cli.datamodule.rows["test"]:
        console.print("There are no test rows, so nothing was scored.")
    elif not cli.trainer.limit_test_batches:
        console.print(f"{name_option('trainer.limit_test_batches', 0)} leaves no test rows, so nothing was scored.")
    else:
        cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    show(console, conclusion(ensemble))
    _show_commands(cli, console)


def _show_commands(cli: SeedLoRACLI, console: Console) -> None:
    """Print the commands that load and serve the adapter that is advised."""
    ensemble = cli.ensemble
    if (name := ensemble.advice["folder"]) is None:
        return
    folder, full = (ensemble.dirpath / name).resolve(), bool(cli.model.options.full_modules)
    if cli.model.options.is_full_finetuning:
        console.print("\n" + model_commands(folder), highlight=False, markup=False)
        return
    rank = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))["r"]
    commands = next_commands(base_model=cli.model.options.base_path, adapter=folder, rank=rank, serve=not full)
    console.print("\n" + commands, highlight=False, markup=False)
    if full:
        why = "no server loads an adapter with full weights beside it; for a whole model, add --into_base"
        console.print(f"# {why} to the command in {ensemble.fused_path / CARD_NAME}", highlight=False, markup=False)
    if note := cli.model.options.base_note:
        console.print(note, highlight=False, markup=False)


def _report(cli: SeedLoRACLI, console: Console) -> None:
    """Write the report, and say what it found out beside the test."""
    run = cli.ensemble.dirpath
    if cli.trainer.fast_dev_run or not cli.trainer.is_global_zero:
        return
    with console.status("Writing the report ..."):
        told = told_report(run, lambda fault: print(one_line(fault), file=sys.stderr))  # noqa: T201
    show(console, told)


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
    # We clip, see seedlora.distributed.strategies; and what DeepSpeed calls in torch is renamed there.
    warnings.filterwarnings("ignore", message="Since DeepSpeed handles gradient clipping internally")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    warnings.filterwarnings("ignore", message=r"torch\.distributed\.nn\.functional\.all_gather is deprecated")
    warnings.filterwarnings("ignore", message="The '.*_dataloader' does not have many workers")
