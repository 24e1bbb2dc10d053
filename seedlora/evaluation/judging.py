"""Judge the answers of a task, and write code to be judged elsewhere."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from seedlora.evaluation import verify
from seedlora.evaluation.extract import python_solution
from seedlora.evaluation.generate import LENGTH
from seedlora.evaluation.samples import SampleLine, Samples, TaskRun
from seedlora.evaluation.sandbox import PASSED, Sandbox
from seedlora.evaluation.tasks import Judgement
from seedlora.utils.files import atomic_file


@dataclass(frozen=True)
class Judged:
    """The verdicts on one task.

    Args:
        task: its name.
        names: of the adapters.
        correct: bool, shape (items, adapters); ``None`` if the task runs code and nobody asked for that.
        quirks: by adapter, how often which quirk of the extraction took part.
        unfinished: by adapter, the answers that ended at ``max_new_tokens``.
        tokens: by adapter, tokens generated.
        groups: sub-domain of each item.
        by_value: bool, shape (items, adapters): what math-verify says, for tasks of formulas, where it is installed.
        measures: shape (items, adapters): how near the answers are to the right ones, by the measure's name.
        loss: by adapter, the mean loss of a token of the right answers; empty where it was not measured.
    """

    task: str
    names: tuple[str, ...]
    correct: np.ndarray | None
    quirks: dict[str, dict[str, int]]
    unfinished: dict[str, int]
    tokens: dict[str, int]
    groups: tuple[str, ...]
    by_value: np.ndarray | None = None
    measures: Mapping[str, np.ndarray] = field(default_factory=dict)
    loss: Mapping[str, float] = field(default_factory=dict)


def judge(
    samples: Samples,
    names: Sequence[str],
    run: TaskRun,
    *,
    sandbox: Sandbox | None = None,
    on_done: Callable[[], object] = lambda: None,
) -> Judged:
    """Judge all samples of a task, which must be there.

    Args:
        samples: the answers.
        names: of the adapters.
        run: the task.
        sandbox: where code runs; without it, tasks of code get no score.
        on_done: called after each program.
    """
    lines = [[samples.lines[run.name, name, item.id] for name in names] for item in run.items]
    verdicts = _verdicts(lines, names, run, sandbox, on_done)
    quirks: dict[str, Counter[str]] = {name: Counter() for name in names}
    for row in verdicts or ():
        for name, verdict in zip(names, row, strict=True):
            quirks[name].update(verdict.quirks)
    return Judged(
        task=run.name,
        names=tuple(names),
        correct=None if verdicts is None else np.array([[v.correct for v in row] for row in verdicts]),
        quirks={name: dict(counts) for name, counts in quirks.items()},
        unfinished={name: sum(row[i]["finish"] == LENGTH for row in lines) for i, name in enumerate(names)},
        tokens={name: sum(row[i]["tokens"] for row in lines) for i, name in enumerate(names)},
        groups=tuple(item.group for item in run.items),
        by_value=_verdicts_by_value(verdicts, len(names), run),
        measures={
            measure: np.array(
                [[near(line["text"], item.gold) for line in row] for item, row in zip(run.items, lines, strict=True)]
            )
            for measure, near in run.task.measures.items()
        },
    )


def _verdicts(
    lines: Sequence[Sequence[SampleLine]],
    names: Sequence[str],
    run: TaskRun,
    sandbox: Sandbox | None,
    on_done: Callable[[], object],
) -> list[list[Judgement]] | None:
    """Judge each answer, by the task's own rule or by running it; None for a task of code without a sandbox."""
    if (judge_one := run.task.judge) is not None:
        return [[judge_one(line["text"], item) for line in row] for item, row in zip(run.items, lines, strict=True)]
    if sandbox is None:
        return None
    assert run.task.program is not None
    programs = [
        run.task.program(line["text"], item) for item, row in zip(run.items, lines, strict=True) for line in row
    ]
    outcomes = sandbox.run_all(programs, on_done=on_done)
    flat = [Judgement(o.status == PASSED, None, () if o.status == PASSED else (o.status,)) for o in outcomes]
    return [flat[i : i + len(names)] for i in range(0, len(flat), len(names))]


def _verdicts_by_value(verdicts: Sequence[Sequence[Judgement]] | None, count: int, run: TaskRun) -> np.ndarray | None:
    """Let math-verify judge formulas a second time, where it is installed; shape (items, ``count`` adapters)."""
    if not run.task.by_value or verdicts is None or not verify.is_available():
        return None
    read = [(str(item.gold), v.read) for item, row in zip(run.items, verdicts, strict=True) for v in row]
    right = iter(verify.verify_all([(gold, str(answer)) for gold, answer in read if answer is not None]))
    return np.array([answer is not None and next(right) for _, answer in read]).reshape(-1, count)


def write_solutions(samples: Samples, names: Sequence[str], run: TaskRun) -> list[Path]:
    """Write code to be scored elsewhere: a file per adapter, lines of ``{"task_id", "solution"}`` as EvalPlus reads."""
    written = []
    for name in names:
        path = samples.folder / "solutions" / f"{run.name}-{name.replace('/', '_')}.jsonl"
        with atomic_file(path) as temporary:
            lines = []
            for item in run.items:
                text = samples.lines[run.name, name, item.id]["text"]
                solution = python_solution(text, item.gold["entry_point"])
                lines.append(json.dumps({"task_id": item.id, "solution": solution}) + "\n")
            temporary.write_text("".join(lines), encoding="utf-8")
        written.append(path)
    return written
