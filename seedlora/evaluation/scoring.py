"""Score adapters on tasks: for ``python -m seedlora evaluate``, and for adapters in memory after training."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from seedlora.datamodules.conversations import Turn
from seedlora.evaluation.answering import EvaluationSetup
from seedlora.evaluation.generate import Generation, StackGenerator
from seedlora.evaluation.harness import PROTOCOL as HARNESS_PROTOCOL
from seedlora.evaluation.harness import Scores, harness_scores
from seedlora.evaluation.items import load_items
from seedlora.evaluation.joint import Joint, joint, joint_table
from seedlora.evaluation.judging import Judged, judge, write_solutions
from seedlora.evaluation.own_rows import Question, answer_losses
from seedlora.evaluation.samples import Samples, TaskRun, generate, open_samples, run_settings
from seedlora.evaluation.sandbox import Sandbox
from seedlora.evaluation.showing import StatusLines, describe_style, long_progress_bar, print_scores, print_unscored
from seedlora.evaluation.tasks import PROTOCOL, TASKS, Generate, check_tasks
from seedlora.names import BASE, is_replica
from seedlora.records.evaluation import (
    EVALUATION_RESULTS,
    HARNESS_RESULTS,
    EvaluationResults,
    HarnessResults,
    JointView,
    TaskResults,
)
from seedlora.scores.intervals import adjust_over_tasks, mean_score, wilson
from seedlora.scores.results import Results, results
from seedlora.scores.tables import titled_table
from seedlora.utils.places import expanded

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


def task_runs(
    names: Sequence[str],
    paths: Mapping[str, str] | None = None,
    *,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    generate: Generate | None = None,
) -> list[TaskRun]:
    """Read the items of tasks.

    Args:
        names: of :data:`TASKS`.
        paths: of test files, by task.
        limit: only the first items.
        max_new_tokens: instead of the protocol's.
        generate: makes the rows of generated tasks.

    Raises:
        ValueError: for what is unknown or out of range; ``OSError`` as :func:`load_items`.
    """
    check_tasks(names)
    for option, value in (("limit", limit), ("max_new_tokens", max_new_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}")
    where = {task: expanded(path) for task, path in (paths or {}).items()}
    if odd := [task for task in where if task not in names]:
        raise ValueError(f"task_path names '{odd[0]}', which is not asked for; asked for are {', '.join(names)}")
    return [
        TaskRun(
            name,
            load_items(name, path=where.get(name), limit=limit, generate=generate),
            max_new_tokens or TASKS[name].max_new_tokens,
        )
        for name in names
    ]


def with_common_limit(runs: Sequence[TaskRun]) -> list[TaskRun]:
    """Give tasks one limit, the longest, so that nothing around a question says which task it is from.

    Raises:
        ValueError: for a single task, one that runs code, or tasks whose answers begin or end differently.
    """
    if len(runs) < 2:
        raise ValueError("joint scores several tasks together; name at least two")
    first, *others = runs
    for run in runs:
        if run.task.judge is None:
            raise ValueError(f"joint cannot take {run.name}: its answers are programs, which have to be run")
    for run in others:
        if (run.task.prefix, run.task.stops) != (first.task.prefix, first.task.stops):
            raise ValueError(
                f"joint gives no hint which task an item is from, but answers of {first.name} and {run.name} begin "
                "or end differently; score them apart"
            )
    longest = max(run.max_new_tokens for run in runs)
    return [replace(run, max_new_tokens=longest) for run in runs]


def make_sandbox(runs: Sequence[TaskRun], *, execute: bool, trust: bool) -> Sandbox | None:
    """Make a sandbox if a task runs code and that is wanted; raises as :class:`Sandbox`."""
    if trust and not execute:
        raise ValueError("without_sandbox changes how code is run; add execute_code to run it at all")
    if not execute or all(run.task.program is None for run in runs):
        return None
    return Sandbox(bubblewrap=not trust)


def score(
    setup: EvaluationSetup,
    runs: Sequence[TaskRun],
    folder: Path,
    console: Console,
    *,
    sandbox: Sandbox | None = None,
    against: str | None = None,
    method: str | None = None,
    together: bool = False,
    replace: bool = False,
) -> EvaluationResults:
    """Generate, judge, compare; print tables and write ``results.json``.

    Args:
        setup: who answers.
        runs: what is asked.
        folder: of samples and results.
        console: for people.
        sandbox: for tasks of code.
        against: the name that all are compared with.
        method: how the fused adapter was made, for the title.
        together: score the tasks as one too, see :mod:`seedlora.evaluation.joint`.
        replace: as in :func:`seedlora.evaluation.samples.open_samples`.

    Returns:
        The results, as in the file: those of other tasks that were scored there before are among them.
    """
    names = [candidate.name for candidate in setup.candidates]
    started = time.monotonic()
    settings = run_settings(setup.candidates, runs, setup.settings)
    with open_samples(folder, settings, replace=replace) as samples:
        if samples.dropped:
            console.print(f"older answers of {', '.join(samples.dropped)} were dropped: these are other weights now")
        with long_progress_bar(console) as progress:
            new = _generate_with_bar(samples, setup, runs, progress)
            seconds = time.monotonic() - started
            judged = [_judge_with_bar(samples, names, run, sandbox, progress) for run in runs]
            judged = [_with_loss(verdicts, run, setup) for verdicts, run in zip(judged, runs, strict=True)]
        scores = [_TaskScores(run, v, _compare_adapters(v, run, against)) for run, v in zip(runs, judged, strict=True)]
        union = joint({v.task: v.correct for v in judged if v.correct is not None}, names) if together else None
        record = _results_record(EVALUATION_RESULTS.read(folder), setup, scores, union)
        EVALUATION_RESULTS.write(folder, record)
        for scored in scores:
            print_scores(console, scored.run, scored.judged, scored.table, method)
            if scored.run.task.program is not None and scored.table is None:
                print_unscored(console, scored.run, write_solutions(samples, names, scored.run))
        if union is not None:
            console.print()
            console.print(joint_table(union))
    if new:
        tokens = sum(answer.tokens for answer in new)
        rate = f"{len(new)} answers, {tokens:,} tokens in {seconds:.0f} s, {tokens / seconds:.0f} tokens/s"
        console.print(f"generated now: {rate}", highlight=False)
    counts = Counter(map(describe_style, setup.candidates))
    told = ", ".join(f"{style} ({count})" if len(counts) > 1 else style for style, count in counts.items())
    console.print(f"prompt style: {told}; samples and results: {folder}", highlight=False, soft_wrap=True)
    return record


@dataclass(frozen=True)
class _TaskScores:
    """The scores of one task; without a table if nobody allowed its code to run."""

    run: TaskRun
    judged: Judged
    table: Results | None


def _results_record(
    before: EvaluationResults | None, setup: EvaluationSetup, scores: Sequence[_TaskScores], union: Joint | None
) -> EvaluationResults:
    """Return what is written as ``results.json``, the tasks among it that were scored there before.

    Those were answered alike: :func:`seedlora.evaluation.samples.open_samples` would have refused.

    Args:
        before: the results so far, if there are any.
        setup: who answered.
        scores: of this evaluation.
        union: the scores over all tasks together, if they were asked for.
    """
    styles = {candidate.name: describe_style(candidate) for candidate in setup.candidates}
    tasks = {scored.run.name: _task_results(scored) for scored in scores}
    view: JointView = {} if union is None else {"joint": union.to_record()}
    record: EvaluationResults = {
        "protocol": PROTOCOL,
        **setup.settings,
        "prompt_styles": styles if before is None else {**before["prompt_styles"], **styles},
        "tasks": tasks if before is None else {**before["tasks"], **tasks},
        **view,
    }
    adjust_over_tasks(
        ((label, against), difference)
        for task in record["tasks"].values()
        for label, references in task["differences"].items()
        for against, difference in references.items()
    )
    return record


def score_with_harness(
    setup: EvaluationSetup,
    tasks: Sequence[str],
    manager: TaskManager,
    folder: Path,
    console: Console,
    *,
    limit: int | None = None,
) -> HarnessResults:
    """Score with lm-evaluation-harness; print a table and write ``lm_eval.json``.

    Args:
        setup: who is scored, with the model in this process.
        tasks: names of tasks or groups of the harness.
        manager: of :func:`seedlora.evaluation.harness.check_harness`.
        folder: of the results.
        console: for people.
        limit: only so many documents of each task.
    """
    assert isinstance(setup.generator, StackGenerator)
    names = [candidate.name for candidate in setup.candidates]

    def say(name: str) -> None:
        console.print(f"lm-eval: {name}", highlight=False)

    scores = harness_scores(setup.generator, names, tasks, manager, limit=limit, on_adapter=say)
    record: HarnessResults = {
        "protocol": HARNESS_PROTOCOL,
        **setup.settings,
        "limit": limit,
        "scores": {
            name: {
                task: {metric: {"value": v.value, "stderr": v.stderr} for metric, v in metrics.items()}
                for task, metrics in by_task.items()
            }
            for name, by_task in scores.items()
        },
    }
    HARNESS_RESULTS.write(folder, record)
    console.print()
    console.print(_harness_table(scores, tasks, limit))
    console.print(f"all tasks and metrics: {folder / HARNESS_RESULTS.name}", highlight=False, soft_wrap=True)
    return record


def _harness_table(scores: Scores, tasks: Sequence[str], limit: int | None) -> Table:
    """Lay out the harness's scores for people: of the tasks and groups asked for, whose parts are in the file."""
    names = list(scores)
    limited = "" if limit is None else f", {limit} documents of each task"
    table = titled_table(f"protocol {HARNESS_PROTOCOL}{limited}; value (standard error)")
    for header in ("task", "metric", "adapter", "value"):
        table.add_column(header, justify="right" if header == "value" else "left", overflow="fold")
    first = scores[names[0]]
    for task in [task for task in first if task in tasks] or list(first):
        for metric in first[task]:
            for name in names:
                cell = scores[name][task][metric]
                error = "" if cell.stderr is None else f" ({cell.stderr:.3f})"
                table.add_row(*((task, metric) if name == names[0] else ("", "")), name, f"{cell.value:.3f}{error}")
            table.add_section()
    return table


def _generate_with_bar(
    samples: Samples, setup: EvaluationSetup, runs: Sequence[TaskRun], progress: Progress
) -> list[Generation]:
    new: list[Generation] = []
    lines, bars = StatusLines(progress.console), list[TaskID]()

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

    generate(samples, setup.generator, setup.candidates, runs, on_start=start, on_done=done, on_smaller=smaller)
    return new


def _judge_with_bar(
    samples: Samples, names: Sequence[str], run: TaskRun, sandbox: Sandbox | None, progress: Progress
) -> Judged:
    if run.task.program is None or sandbox is None:
        return judge(samples, names, run)
    bar = progress.add_task(f"running {run.name}", total=len(names) * len(run.items))
    return judge(samples, names, run, sandbox=sandbox, on_done=lambda: progress.advance(bar))


def _with_loss(judged: Judged, run: TaskRun, setup: EvaluationSetup) -> Judged:
    """Add the loss of the right answers, for a task that has it and a model in this process."""
    if not run.task.answer_loss or not isinstance(setup.generator, StackGenerator):
        return judged
    questions = [
        Question((Turn("user", item.request),) if isinstance(item.request, str) else item.request, item.gold)
        for item in run.items
    ]
    loss = {}
    for candidate in setup.candidates:
        if candidate.name in setup.generator.mixtures:
            continue  # a mean of probabilities has no forward of its own
        each = answer_losses(setup.generator, candidate.name, candidate.settings["prompt"], questions)
        loss[candidate.name] = sum(row.total for row in each) / sum(row.tokens for row in each)
    return replace(judged, loss=loss)


def _compare_adapters(judged: Judged, run: TaskRun, against: str | None) -> Results | None:
    """Compare merged adapters with mean seed and soup if there are seeds; otherwise all with the first."""
    if judged.correct is None:
        return None
    names = list(judged.names)
    seeds = [name for name in names if is_replica(name)]
    if against is not None or len(seeds) < 2 or not set(names) - set(seeds) - {BASE}:
        against, seeds = against or (names[0] if len(names) > 1 else None), []
    cut = "" if run.max_new_tokens == run.task.max_new_tokens else f", but {run.max_new_tokens} new tokens"
    return results(judged.correct, names, seeds, metric=f"protocol {PROTOCOL}{cut}", against=against)


def _task_results(scored: _TaskScores) -> TaskResults:
    """Return what ``results.json`` says of one task."""
    run, judged, table = scored.run, scored.judged, scored.table
    asked = run.settings
    found: TaskResults = {
        "n": len(run.items),
        "items_sha256": run.sha256,
        "chance": run.task.chance,
        "prefix": asked["prefix"],
        "stops": asked["stops"],
        "max_new_tokens": asked["max_new_tokens"],
        "protocol_max_new_tokens": run.task.max_new_tokens,
        "scores": None,
        "differences": {},
    }
    if table is not None:
        compared = table.to_record()
        found["scores"], found["differences"] = compared["scores"], compared["differences"]
        found["metric"], found["mean_seed"] = compared["metric"], compared["mean_seed"]
        found["seed_spread"], found["best_seed"] = compared["seed_spread"], compared["best_seed"]
        found["items"] = table.items
    found["quirks"], found["unfinished"], found["tokens"] = judged.quirks, judged.unfinished, judged.tokens
    if judged.measures:
        found["measures"] = {
            measure: {name: mean_score(column).to_record() for name, column in zip(judged.names, values.T, strict=True)}
            for measure, values in judged.measures.items()
        }
    if judged.loss:
        found["loss"] = dict(judged.loss)
    if judged.by_value is not None:
        by_name = zip(judged.names, judged.by_value.T, strict=True)
        found["math_verify_scores"] = {name: wilson(column).to_record() for name, column in by_name}
    groups = sorted(set(judged.groups) - {""})
    if judged.correct is not None and groups:
        columns = dict(zip(judged.names, judged.correct.T, strict=True))
        rows = {group: np.array([g == group for g in judged.groups]) for group in groups}
        found["domains"] = {"sub-domain": list(judged.groups)}
        found["groups"] = {
            group: {name: wilson(column[where]).to_record() for name, column in columns.items()}
            for group, where in rows.items()
        }
    return found
