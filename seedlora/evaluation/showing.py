"""Show an evaluation in the terminal: bars, tables, where files are."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from seedlora.evaluation.judging import Judged
from seedlora.evaluation.samples import Candidate, TaskRun
from seedlora.scores.results import Results
from seedlora.scores.tables import results_table, titled_table, verdict
from seedlora.utils.progress import progress_bar


class StatusLines:
    """Prints a line now and then, where no bar can be seen."""

    def __init__(self, console: Console, *, every: float = 60.0) -> None:
        self.console, self.every, self.last = console, every, time.monotonic()

    def show(self, progress: Progress, task: TaskID) -> None:
        """Print a line if the last one is long ago."""
        if self.console.is_terminal or time.monotonic() - self.last < self.every:
            return
        self.last = time.monotonic()
        shown = progress.tasks[task]
        left = "" if shown.time_remaining is None else f", about {shown.time_remaining / 60:.0f} min left"
        self.console.print(f"{shown.description}: {shown.completed:.0f} of {shown.total:.0f}{left}", highlight=False)


def long_progress_bar(console: Console) -> Progress:
    """Return a bar that shows the time that is left."""
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    return progress_bar(MofNCompleteColumn(), *times, console=console, speed_estimate_period=600)


def print_scores(console: Console, run: TaskRun, judged: Judged, table: Results | None, method: str | None) -> None:
    """Print the scores of one task."""
    console.print()
    if table is not None:
        console.print(results_table(table, method=method, title=run.name))
        if table.differences:
            console.print(verdict(table), highlight=False)
    columns = list(dict.fromkeys(quirk for counts in judged.quirks.values() for quirk in counts))
    answers = titled_table(f"{run.name}: {len(run.items)} answers each")
    answers.add_column("adapter")
    for header in (f"cut at {run.max_new_tokens} tokens", "mean tokens", *columns):
        answers.add_column(header, justify="right")
    measured = {f"mean {measure}": values.mean(0) for measure, values in judged.measures.items()}
    for header in (*measured, *(["loss of the right answer"] if judged.loss else [])):
        answers.add_column(header, justify="right")
    if judged.by_value is not None:
        answers.add_column("score by math-verify", justify="right")
    for i, name in enumerate(judged.names):
        value = [] if judged.by_value is None else [f"{100 * judged.by_value[:, i].mean():.1f}"]
        value = (
            [f"{100 * means[i]:.1f}" for means in measured.values()]
            + ([f"{judged.loss[name]:.4f}" if name in judged.loss else "-"] if judged.loss else [])
            + value
        )
        counts = [judged.unfinished[name], round(judged.tokens[name] / len(run.items))]
        answers.add_row(name, *map(str, counts + [judged.quirks[name].get(quirk, 0) for quirk in columns]), *value)
    console.print(answers)


def print_unscored(console: Console, run: TaskRun, files: Sequence[Path]) -> None:
    """Print where the answers of a task are that was not scored."""
    console.print(
        f"{run.name} is not scored: that runs generated code. Add --execute_code (of train.py: --evaluate.execute_code "
        "true) to run it inside bubblewrap, or score these files elsewhere, with EvalPlus for example:",
        highlight=False,
    )
    for file in files:
        console.print(f"  {file}", highlight=False, soft_wrap=True)


def describe_style(candidate: Candidate) -> str:
    """Return the prompt style of a candidate and where it is from."""
    record = candidate.settings["prompt"]
    return f"{record['style']}, of its training" if isinstance(record, Mapping) else f"{record}, by choice"
