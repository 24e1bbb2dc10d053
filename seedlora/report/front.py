"""Answer what a reader asks first: what to use, how sure that is, what to do next, and what it cost."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from datetime import date

from seedlora.model.embedded import EMBEDDED, EMBEDDED_NAME
from seedlora.names import BASE, FULL, FUSED
from seedlora.records.front import Command, Front
from seedlora.records.report import Advice, Share, TestSet, TrainingCurves
from seedlora.records.results import ScoreRecord
from seedlora.report.sentences import verdict_of
from seedlora.report.stored import StoredRun
from seedlora.scores.wording import LOSS

_MONTHS = "January February March April May June July August September October November December".split()  # noqa: SIM905


def front_record(
    run: StoredRun, tests: Sequence[TestSet], curves: TrainingCurves, advised: Advice, shares: Sequence[Share]
) -> Front:
    """Return what the first screen of a report says.

    Args:
        run: what is stored.
        tests: what was tested; the first is shown.
        curves: the losses so far.
        advised: what to use.
        shares: what the ensemble took.
    """
    pending = bool(run.pending)
    label = None if pending else advised["use"]
    path = None if label is None or advised["folder"] is None else str(run.started_as / advised["folder"])
    helped, sure = ("", "") if pending else (advised["headline"][0], " ".join(advised["headline"][1:]))
    scores: dict[str, ScoreRecord] = {row["adapter"]: _score(row) for test in tests[:1] for row in test["scores"]}
    took = 0.0 if run.cost is None else sum(sum(phases.values()) for phases in run.cost["took"].values())
    tokens = next((share["all"] for share in shares if share["what"].startswith("tokens")), None)
    return {
        "model": _model_name(run),
        "data": _data_name(run),
        "started": _day(run),
        "state": _state(run, curves) if pending else None,
        "adapter": label,
        "path": path,
        "commands": [] if path is None else _commands(path, whole=run.settings.get("model.adapter") == FULL),
        "before": None if pending else scores.get(BASE),
        "after": None if label is None else scores.get(label),
        "helped": helped,
        "sure": sure,
        "compared": verdict_of(run, tests, curves),
        "tokens": tokens,
        "seconds": took or None,
        "peak_gib": run.cost["peak_bytes"] / 2**30 if run.cost is not None and run.cost["peak_bytes"] else None,
    }


def title_of(front: Front) -> str:
    """Name a run by what was trained on what, and when."""
    model = "SeedLoRA" if front["model"] is None else front["model"]
    what = f"{model} on {front['data']}"
    return what if front["started"] is None else f"{what}, {_in_words(front['started'])}"


def _in_words(day: str) -> str:
    """Write a day.

    >>> _in_words("2026-11-30")
    '30 November 2026'
    """
    read = date.fromisoformat(day)
    return f"{read.day} {_MONTHS[read.month - 1]} {read.year}"


def _score(row: ScoreRecord) -> ScoreRecord:
    return {"value": row["value"], "low": row["low"], "high": row["high"], "n": row["n"]}


def _model_name(run: StoredRun) -> str | None:
    """Return what people call the base model: the last part of its folder or hub id."""
    given = str(run.settings.get("model.base_model", "")).rstrip("/")
    return EMBEDDED_NAME if given == EMBEDDED else given.rpartition("/")[2] or None


def _data_name(run: StoredRun) -> str:
    """Return what was trained on: the task, the name of the file, or the data module."""
    task, path = run.settings.get("data.task"), run.settings.get("data.path")
    if isinstance(task, str):
        return task
    return path.rstrip("/").rpartition("/")[2] if isinstance(path, str) and path else str(run.settings.get("data", "?"))


def _day(run: StoredRun) -> str | None:
    """Return the day that is stored, or that the folder is named by."""
    if run.cost is not None and "started" in run.cost:
        return run.cost["started"][:10]
    named = re.match(r"\d{4}-\d\d-\d\d(?=_)", run.name)
    return named[0] if named else None


def _state(run: StoredRun, curves: TrainingCurves) -> str:
    """Say how far a run is that is not finished."""
    steps = {seed: int(curve[-1][0]) for seed in run.pending if (curve := curves["train"].get(seed))}
    waiting = len(run.pending) - len(steps)
    parts = [f"{len(run.trained)} of {len(run.seeds)} seeds are trained"]
    if steps:
        whole = "" if run.cost is None else f" of {run.cost['plan']['steps']:,}"
        parts.append(f"{', '.join(steps)} at step {max(steps.values()):,}{whole}")
    if waiting and steps:
        parts.append(f"{waiting} not begun")
    last = {label: end["last"] for label, end in curves["ends"].items() if label == FUSED or label in steps}
    losses = ", ".join(f"{label} {LOSS(loss)}" for label, loss in last.items())
    return "; ".join(parts) + "." + (f" Validation loss so far: {losses}." if losses else "")


def _commands(path: str, *, whole: bool) -> list[Command]:
    """Return what can be done with an adapter, or with a whole model."""
    quoted = shlex.quote(path)
    library, loader = ("transformers", "AutoModelForCausalLM") if whole else ("peft", "AutoPeftModelForCausalLM")
    return [
        {"what": "Talk to it", "line": f"python -m seedlora chat {quoted}"},
        {"what": "Serve it", "line": f"python -m seedlora serve {quoted}"},
        {"what": "Load it in Python", "line": f"from {library} import {loader}\n{loader}.from_pretrained({path!r})"},
    ]
