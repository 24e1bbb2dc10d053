"""``python -m seedlora evaluate``, and the same for adapters that are still in memory after training."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from seedlora.adapter import PROMPT_NAME
from seedlora.atomic import write_text
from seedlora.evaluation.answering import DEFAULT_STYLE, DTYPES, Prompts, Scored, from_endpoint, from_folders
from seedlora.evaluation.generate import Generation, StackGenerator
from seedlora.evaluation.harness import PROTOCOL as HARNESS_PROTOCOL
from seedlora.evaluation.harness import check_harness, harness_scores
from seedlora.evaluation.joint import joint, joint_table
from seedlora.evaluation.run import (
    RESULTS_NAME,
    Candidate,
    Judged,
    Samples,
    TaskRun,
    generate,
    judge,
    open_samples,
    run_settings,
    write_solutions,
)
from seedlora.evaluation.sandbox import Sandbox
from seedlora.evaluation.statistics import adjust_over_tasks, wilson
from seedlora.evaluation.tasks import PROTOCOL, TASKS, Generate, check_tasks, load_items
from seedlora.report.results import BASE, Results, results
from seedlora.report.tables import results_table, verdict

HARNESS_NAME = "lm_eval.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("--adapter", action="append", default=[], metavar="[NAME=]DIR", help="a PEFT folder or hub id; repeat it")
    add("--task", default="", metavar="A,B", help=f"from {', '.join(TASKS)}")
    add("--limit", type=int, help="only the first N items of each task")
    add("--out", default="evaluation", help="folder of samples and results; what is there is not generated again")
    add("--base-model", help="default: what the adapters name")
    add("--with-base", action="store_true", help="score the base model too")
    add("--against", metavar="NAME", help="compare all with this one; default: merged with mean seed, or the first")
    add("--joint", action="store_true", help="also over all tasks together, and relative to adapters named like tasks")
    add("--json", action="store_true", help="print the results as JSON")
    data = parser.add_argument_group("tasks")
    add = data.add_argument
    add("--task-path", action="append", default=[], metavar="TASK=PATH", help="a file, a mirrored folder, or 'hub'")
    add("--prompt-style", help=f"for adapters without a {PROMPT_NAME}; default: {DEFAULT_STYLE}")
    add("--max-new-tokens", type=int, help="instead of the protocol's; the results then say so")
    add("--execute-code", action="store_true", help="run generated code, inside bubblewrap, to score it")
    add("--without-sandbox", action="store_true", help="accept the risk of running it without bubblewrap")
    harness = parser.add_argument_group("protocol lm-eval", "lm-evaluation-harness, the extra seedlora[lm-eval]")
    add = harness.add_argument
    add("--lm-eval", default="", metavar="A,B", help="tasks of the harness: mmlu, bbh, truthfulqa_mc2, ...")
    add("--lm-eval-path", metavar="DIR", help="a folder with YAML files of tasks of your own")
    work = parser.add_argument_group("generation")
    add = work.add_argument
    add("--batch-size", type=int, default=16, help="items in one forward; each adapter answers all of them")
    add("--dtype", choices=list(DTYPES), default="auto", help="of the base model")
    add("--endpoint", metavar="URL", help="a completions server; the model's name there is the adapter's here")
    add("--concurrency", type=int, default=16, help="requests at once")
    add("--timeout", type=float, default=600.0, help="seconds for one request")


def evaluate(arguments: Mapping[str, Any], prompts: Prompts | None, generate: Generate | None = None) -> None:
    """Run ``evaluate``.

    Args:
        arguments: of :func:`add_arguments`.
        prompts: how requests become prompts.
        generate: makes the rows of generated tasks.

    Raises:
        ValueError: for a request that cannot be carried out.
        OSError: if data, model or server cannot be reached.
    """
    if prompts is None:
        raise ValueError("evaluate needs prompt styles; start it by python -m seedlora evaluate")
    names, harness = (_words(arguments[key]) for key in ("task", "lm_eval"))
    if not names and not harness:
        raise ValueError(f"--task is missing; choose from {', '.join(TASKS)}")
    if harness and arguments["endpoint"]:
        raise ValueError("--lm-eval scores a model in this process; give --endpoint in a run of its own")
    _check_read(arguments)
    if not arguments["adapter"] and not arguments["base_model"]:
        raise ValueError("give at least one --adapter, or a --base-model to score alone")
    console = Console(stderr=True) if arguments["json"] else Console()
    runs = task_runs(names, arguments["task_path"], arguments["limit"], arguments["max_new_tokens"], generate)
    if arguments["joint"]:
        runs = alike(runs)
    harness_path = Path(arguments["lm_eval_path"]) if arguments["lm_eval_path"] else None
    manager = check_harness(harness, harness_path) if harness else None
    sandbox = make_sandbox(runs, execute=arguments["execute_code"], trust=arguments["without_sandbox"])
    if arguments["endpoint"]:
        with console.status(f"Asking {arguments['endpoint']} which models it has ..."):
            scored = from_endpoint(arguments, prompts)
    else:
        scored = from_folders(arguments, prompts, console)
    against = arguments["against"]
    if against is not None and against not in (known := [c.name for c in scored.candidates]):
        raise ValueError(f"--against '{against}' is not scored; there are {', '.join(known)}")
    out, found = Path(arguments["out"]), {}
    if runs:
        try:
            found[PROTOCOL] = score(
                scored, runs, out, console, sandbox=sandbox, against=against, together=arguments["joint"]
            )
        except KeyboardInterrupt:
            raise OSError("interrupted; the answers so far are kept: the same command goes on from them") from None
        if arguments["limit"] is not None:
            console.print("all items: the same without --limit; these answers are kept", highlight=False)
    if harness:
        found[HARNESS_PROTOCOL] = score_with_harness(scored, harness, manager, out, console, limit=arguments["limit"])
    if arguments["json"]:
        print(json.dumps(found, indent=2))  # noqa: T201 - what --json asks for


#: Options that the harness, which has its own ways, does not read.
_OF_TASKS = ("task_path", "prompt_style", "max_new_tokens", "execute_code", "without_sandbox", "against", "joint")


def _check_read(arguments: Mapping[str, Any]) -> None:
    """Raise ValueError for an option that is given and that nothing of what is asked for would read."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    idle: dict[str, Sequence[str]] = {
        "--endpoint asks a server, which has its own": ("dtype", "batch_size") if arguments["endpoint"] else (),
        "only --endpoint reads it": () if arguments["endpoint"] else ("concurrency", "timeout"),
        "only --task reads it": () if arguments["task"] else _OF_TASKS,
        "only --lm-eval reads it": () if arguments["lm_eval"] else ("lm_eval_path",),
    }
    for reason, keys in idle.items():
        if given := [key for key in keys if arguments[key] != parser.get_default(key)]:
            raise ValueError(f"--{given[0].replace('_', '-')} would change nothing: {reason}")


def task_runs(
    names: Sequence[str],
    paths: Sequence[str] = (),
    limit: int | None = None,
    max_new_tokens: int | None = None,
    generate: Generate | None = None,
) -> list[TaskRun]:
    """The tasks with their items.

    Args:
        names: of :data:`TASKS`.
        paths: ``TASK=PATH`` each.
        limit: only the first items.
        max_new_tokens: instead of the protocol's.
        generate: makes the rows of generated tasks.

    Raises:
        ValueError: for what is unknown or out of range; ``OSError`` as :func:`load_items`.
    """
    check_tasks(names)
    for option, value in (("limit", limit), ("max-new-tokens", max_new_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"--{option} must be at least 1, got {value}")
    where = {}
    for pair in paths:
        task, equals, path = pair.partition("=")
        if not equals or task not in names:
            raise ValueError(f"--task-path '{pair}' must be TASK=PATH for a task that is asked for: {', '.join(names)}")
        where[task] = Path(path).expanduser()
    return [
        TaskRun(
            name,
            load_items(name, path=where.get(name), limit=limit, generate=generate),
            max_new_tokens or TASKS[name].max_new_tokens,
        )
        for name in names
    ]


def alike(runs: Sequence[TaskRun]) -> list[TaskRun]:
    """Tasks such that nothing around a question says which of them it is from: the longest limit for all.

    Raises:
        ValueError: for a single task, one that runs code, or tasks whose answers begin or end differently.
    """
    if len(runs) < 2:
        raise ValueError("--joint scores several tasks together; name at least two by --task A,B")
    first, *others = runs
    for run in runs:
        if run.task.judge is None:
            raise ValueError(f"--joint cannot take {run.name}: its answers are programs, which have to be run")
    for run in others:
        if (run.task.prefix, run.task.stops) != (first.task.prefix, first.task.stops):
            raise ValueError(
                f"--joint gives no hint which task an item is from, but answers of {first.name} and {run.name} begin "
                "or end differently; score them apart"
            )
    longest = max(run.max_new_tokens for run in runs)
    return [replace(run, max_new_tokens=longest) for run in runs]


def make_sandbox(runs: Sequence[TaskRun], *, execute: bool, trust: bool) -> Sandbox | None:
    """A sandbox if a task runs code and that is wanted; raises as :class:`Sandbox`."""
    if trust and not execute:
        raise ValueError("--without-sandbox changes how code is run; add --execute-code to run it at all")
    if not execute or all(run.task.program is None for run in runs):
        return None
    return Sandbox(bubblewrap=not trust)


def score(
    scored: Scored,
    runs: Sequence[TaskRun],
    folder: Path,
    console: Console,
    *,
    sandbox: Sandbox | None = None,
    against: str | None = None,
    method: str | None = None,
    together: bool = False,
    replace: bool = False,
) -> dict[str, Any]:
    """Generate, judge, compare; print tables and write ``results.json``.

    Args:
        scored: who answers.
        runs: what is asked.
        folder: of samples and results.
        console: for people.
        sandbox: for tasks of code.
        against: the name that all are compared with.
        method: how the fused adapter was made, for the title.
        together: score the tasks as one too, see :mod:`seedlora.evaluation.joint`.
        replace: as in :func:`seedlora.evaluation.run.open_samples`.

    Returns:
        The results, as in the file: those of other tasks that were scored there before are among them.
    """
    names = [candidate.name for candidate in scored.candidates]
    started = time.monotonic()
    settings = run_settings(scored.candidates, runs, **scored.settings)
    with open_samples(folder, settings, replace=replace) as samples:
        if samples.dropped:
            console.print(f"older answers of {', '.join(samples.dropped)} were dropped: these are other weights now")
        with _progress(console) as progress:
            new = _generate(samples, scored, runs, progress)
            seconds = time.monotonic() - started
            judged = [_judge(samples, names, run, sandbox, progress) for run in runs]
        tables = [None if v.correct is None else _compare(v, run, against) for run, v in zip(runs, judged, strict=True)]
        # Other tasks that are there were answered alike: open_samples would have refused.
        file = folder / RESULTS_NAME
        before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        styles = {candidate.name: _style(candidate) for candidate in scored.candidates}
        now = {v.task: _plain(v, run, table) for v, run, table in zip(judged, runs, tables, strict=True)}
        found = {
            "protocol": PROTOCOL,
            **scored.settings,
            "prompt_styles": {**before.get("prompt_styles", {}), **styles},
            "tasks": {**before.get("tasks", {}), **now},
        }
        adjust_over_tasks(
            ((label, against), difference)
            for task in found["tasks"].values()
            for label, references in task["differences"].items()
            for against, difference in references.items()
        )
        union = joint({v.task: v.correct for v in judged if v.correct is not None}, names) if together else None
        if union is not None:
            found["joint"] = union.to_dict()
        write_text(file, json.dumps(found, indent=2) + "\n")
        for run, verdicts, table in zip(runs, judged, tables, strict=True):
            _show(console, run, verdicts, table, method)
            if run.task.program is not None and table is None:
                _say_unscored(console, run, write_solutions(samples, names, run))
        if union is not None:
            console.print()
            console.print(joint_table(union))
    if new:
        tokens = sum(said.tokens for said in new)
        rate = f"{len(new)} answers, {tokens:,} tokens in {seconds:.0f} s, {tokens / seconds:.0f} tokens/s"
        console.print(f"generated now: {rate}", highlight=False)
    counts = Counter(styles.values())
    told = ", ".join(f"{style} ({count})" if len(counts) > 1 else style for style, count in counts.items())
    console.print(f"prompt style: {told}; samples and results: {folder}", highlight=False, soft_wrap=True)
    return found


def score_with_harness(
    scored: Scored, tasks: Sequence[str], manager: Any, folder: Path, console: Console, *, limit: int | None = None
) -> dict[str, Any]:
    """Score with lm-evaluation-harness; print a table and write ``lm_eval.json``.

    Args:
        scored: who is scored, with the model in this process.
        tasks: names of tasks or groups of the harness.
        manager: of :func:`seedlora.evaluation.harness.check_harness`.
        folder: of the results.
        console: for people.
        limit: only so many documents of each task.
    """
    assert isinstance(scored.generator, StackGenerator)
    names = [candidate.name for candidate in scored.candidates]
    say = lambda name: console.print(f"lm-eval: {name}", highlight=False)  # noqa: E731
    scores = harness_scores(scored.generator, names, tasks, manager, limit=limit, on_adapter=say)
    plain = {name: {t: {m: asdict(v) for m, v in ms.items()} for t, ms in by.items()} for name, by in scores.items()}
    found = {"protocol": HARNESS_PROTOCOL, **scored.settings, "limit": limit, "scores": plain}
    write_text(folder / HARNESS_NAME, json.dumps(found, indent=2) + "\n")
    limited = "" if limit is None else f", {limit} documents of each task"
    table = Table(title=f"protocol {HARNESS_PROTOCOL}{limited}; value (standard error)", title_justify="left")
    for header in ("task", "metric", "adapter", "value"):
        table.add_column(header, justify="right" if header == "value" else "left", overflow="fold")
    # A group's own line says it all; its many parts are in the file.
    first = scores[names[0]]
    for task in [task for task in first if task in tasks] or list(first):
        for metric in first[task]:
            for name in names:
                cell = scores[name][task][metric]
                error = "" if cell.stderr is None else f" ({cell.stderr:.3f})"
                table.add_row(*((task, metric) if name == names[0] else ("", "")), name, f"{cell.value:.3f}{error}")
            table.add_section()
    console.print()
    console.print(table)
    console.print(f"all tasks and metrics: {folder / HARNESS_NAME}", highlight=False, soft_wrap=True)
    return found


def _words(text: str) -> list[str]:
    return [word for word in text.replace(" ", ",").split(",") if word]


# What people see


class _Lines:
    """A line now and then, where no bar can be seen."""

    def __init__(self, console: Console, *, every: float = 60.0) -> None:
        self.console, self.every, self.last = console, every, time.monotonic()

    def show(self, progress: Progress, task: Any) -> None:
        if self.console.is_terminal or time.monotonic() - self.last < self.every:
            return
        self.last = time.monotonic()
        shown = progress.tasks[task]
        left = "" if shown.time_remaining is None else f", about {shown.time_remaining / 60:.0f} min left"
        self.console.print(f"{shown.description}: {shown.completed:.0f} of {shown.total:.0f}{left}", highlight=False)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    return Progress(
        *columns, *times, console=console, transient=True, disable=not console.is_terminal, speed_estimate_period=600
    )


def _generate(samples: Samples, scored: Scored, runs: Sequence[TaskRun], progress: Progress) -> list[Generation]:
    new: list[Generation] = []
    lines, bars = _Lines(progress.console), list[Any]()

    def start(task: str, there: int, wanted: int) -> None:
        bars.append(progress.add_task(task, total=wanted, completed=there))
        if there:
            progress.console.print(f"{task}: {there} of {wanted} answers are there already", highlight=False)

    def done(said: Generation) -> None:
        new.append(said)
        progress.advance(bars[-1])
        lines.show(progress, bars[-1])

    def smaller(size: int) -> None:
        progress.console.print(f"the memory is too small for this batch; going on with a batch of {size}")

    generate(samples, scored.generator, scored.candidates, runs, on_start=start, on_done=done, on_smaller=smaller)
    return new


def _judge(samples: Samples, names: Sequence[str], run: TaskRun, sandbox: Sandbox | None, progress: Progress) -> Judged:
    if run.task.program is None or sandbox is None:
        return judge(samples, names, run)
    bar = progress.add_task(f"running {run.name}", total=len(names) * len(run.items))
    return judge(samples, names, run, sandbox=sandbox, on_done=lambda: progress.advance(bar))


def _compare(judged: Judged, run: TaskRun, against: str | None) -> Results:
    """Merged adapters with mean seed and soup if there are seeds; otherwise all with the first."""
    assert judged.correct is not None
    names = list(judged.names)
    seeds = [name for name in names if re.fullmatch(r"seed_\d+", name)]
    if against is not None or len(seeds) < 2 or not set(names) - set(seeds) - {BASE}:
        against, seeds = against or (names[0] if len(names) > 1 else None), []
    cut = "" if run.max_new_tokens == run.task.max_new_tokens else f", but {run.max_new_tokens} new tokens"
    return results(judged.correct, names, seeds, metric=f"protocol {PROTOCOL}{cut}", against=against)


def _plain(judged: Judged, run: TaskRun, table: Results | None) -> dict[str, Any]:
    """One task of ``results.json``."""
    found: dict[str, Any] = {
        "n": len(run.items),
        "items_sha256": run.sha256,
        "chance": run.task.chance,
        **run.settings,
        "protocol_max_new_tokens": run.task.max_new_tokens,
        "scores": None,
        "differences": {},
        **({} if table is None else table.to_dict()),
        "quirks": judged.quirks,
        "unfinished": judged.unfinished,
        "tokens": judged.tokens,
    }
    if judged.by_value is not None:
        by_name = zip(judged.names, judged.by_value.T, strict=True)
        found["math_verify_scores"] = {name: asdict(wilson(column)) for name, column in by_name}
    groups = sorted(set(judged.groups) - {""})
    if judged.correct is not None and groups:
        columns = dict(zip(judged.names, judged.correct.T, strict=True))
        rows = {group: np.array([g == group for g in judged.groups]) for group in groups}
        found["domains"] = {"sub-domain": list(judged.groups)}
        found["groups"] = {
            group: {name: asdict(wilson(column[where])) for name, column in columns.items()}
            for group, where in rows.items()
        }
    return found


def _show(console: Console, run: TaskRun, judged: Judged, table: Results | None, method: str | None) -> None:
    console.print()
    if table is not None:
        console.print(results_table(table, method=method, title=run.name))
        if table.differences:
            console.print(verdict(table), highlight=False)
    columns = list(dict.fromkeys(quirk for counts in judged.quirks.values() for quirk in counts))
    answers = Table(title=f"{run.name}: {len(run.items)} answers each", title_justify="left")
    answers.add_column("adapter")
    for header in (f"cut at {run.max_new_tokens} tokens", "mean tokens", *columns):
        answers.add_column(header, justify="right")
    if judged.by_value is not None:
        answers.add_column("score by math-verify", justify="right")
    for i, name in enumerate(judged.names):
        value = [] if judged.by_value is None else [f"{100 * judged.by_value[:, i].mean():.1f}"]
        counts = [judged.unfinished[name], round(judged.tokens[name] / len(run.items))]
        answers.add_row(name, *map(str, counts + [judged.quirks[name].get(quirk, 0) for quirk in columns]), *value)
    console.print(answers)


def _say_unscored(console: Console, run: TaskRun, files: Sequence[Path]) -> None:
    console.print(
        f"{run.name} is not scored: that runs generated code. Add --execute-code (of train.py: --evaluate_execute_code "
        "true) to run it inside bubblewrap, or score these files elsewhere, with EvalPlus for example:",
        highlight=False,
    )
    for file in files:
        console.print(f"  {file}", highlight=False, soft_wrap=True)


def _style(candidate: Candidate) -> str:
    record = candidate.settings["prompt"]
    return f"{record}, by choice" if isinstance(record, str) else f"{record['style']}, of its training"
