"""Keep the answers of adapters to tasks in a folder, so that an evaluation can be interrupted.

A folder holds the state: ``samples.jsonl``, one line per adapter and item, and ``settings.json``, what they were
generated with. What is there is not generated again; what was generated otherwise is refused, never mixed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias, TypedDict, cast

import torch

from seedlora.datamodules.conversations import Turn
from seedlora.evaluation.generate import Generation, Generator, Prompt
from seedlora.evaluation.tasks import PROTOCOL, TASKS, Item, Task
from seedlora.records.evaluation import (
    EVALUATION_RESULTS,
    EVALUATION_SETTINGS,
    CandidateSettings,
    EvaluationSettings,
    GeneratorSettings,
    TaskSettings,
)
from seedlora.utils.files import write_text
from seedlora.utils.plain_data import from_json

SAMPLES_NAME = "samples.jsonl"
#: What is left to do where a folder holds other samples; train.py has its folder below the run.
_MOVE_AWAY = "move that folder away (python -m seedlora evaluate can take another --out)"


@dataclass(frozen=True)
class Candidate:
    """An adapter, or the base model, to be scored.

    Args:
        name: how results call it.
        prompt: from what is asked, and what the answer begins with, to the prompt.
        settings: what identifies it: a checksum, the prompt style.
    """

    name: str
    prompt: Callable[[str | tuple[Turn, ...], str], Prompt]
    settings: CandidateSettings


@dataclass(frozen=True)
class TaskRun:
    """A task with its items, and perhaps fewer tokens than the protocol gives an answer."""

    name: str
    items: Sequence[Item]
    max_new_tokens: int

    @property
    def task(self) -> Task:
        """Return the task's entry in the table."""
        return TASKS[self.name]

    @property
    def sha256(self) -> str:
        """Return the sha256 of the items, in order: what is asked, and what is right."""
        asked = [[_plain(item.request), item.gold, item.group] for item in self.items]
        return hashlib.sha256(json.dumps(asked, default=str).encode()).hexdigest()

    @property
    def settings(self) -> TaskSettings:
        """Return what decides a generation, as plain data."""
        return {**self.task.settings, "max_new_tokens": self.max_new_tokens}


def _plain(request: str | tuple[Turn, ...]) -> object:
    return request if isinstance(request, str) else [asdict(turn) for turn in request]


class SampleLine(TypedDict):
    """A line of ``samples.jsonl``: an answer, with the prompt's checksum, its tokens, and why it ended."""

    task: str
    adapter: str
    item: str
    prompt_sha256: str
    text: str
    tokens: int
    finish: str


#: Task, adapter and item.
SampleKey: TypeAlias = tuple[str, str, str]


@dataclass
class Samples:
    """The answers of a folder so far.

    Args:
        folder: where they are kept.
        lines: the answers.
        dropped: adapters whose older answers were dropped, because the weights behind their names have changed.
    """

    folder: Path
    lines: dict[SampleKey, SampleLine]
    dropped: Sequence[str] = ()

    @property
    def path(self) -> Path:
        """Return the file of the answers."""
        return self.folder / SAMPLES_NAME

    def add(self, task: str, adapter: str, item: str, prompt: Prompt, said: Generation) -> None:
        """Append one line; it is on its way to the disk when this returns."""
        line: SampleLine = {
            "task": task,
            "adapter": adapter,
            "item": item,
            "prompt_sha256": _prompt_digest(prompt),
            "text": said.text,
            "tokens": said.tokens,
            "finish": said.finish,
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.lines[task, adapter, item] = line


@contextmanager
def open_samples(folder: Path, settings: EvaluationSettings, *, replace: bool = False) -> Iterator[Samples]:
    """Open the answers of a folder, for one process at a time, after checking that they were generated like new ones.

    Args:
        folder: made if it is not there.
        settings: what they are generated with; the folder may hold other ``adapters`` and ``tasks`` too.
        replace: where the weights behind a name have changed, drop its samples and all results instead of raising.

    Raises:
        ValueError: if the folder's samples were generated with other settings, or another process writes to it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another evaluation is writing to {folder}; wait for it, or {_MOVE_AWAY}") from None
        before = EVALUATION_SETTINGS.read(folder)
        plain = EVALUATION_SETTINGS.as_read(settings)
        dropped = _adapters_with_other_weights(before, plain) if replace and before is not None else []
        if dropped and before is not None:
            # The settings come last: until then they say whose samples these were.
            _drop_samples(folder / SAMPLES_NAME, dropped)
            (folder / EVALUATION_RESULTS.name).unlink(missing_ok=True)
            before["adapters"] = {name: known for name, known in before["adapters"].items() if name not in dropped}
        for path, old, new in _conflicts(before or {}, plain):
            raise ValueError(
                f"{folder} holds samples generated with {path} = {_shortened(old)}, now it is {_shortened(new)}; "
                f"repeat the evaluation as it was, or {_MOVE_AWAY}"
            )
        EVALUATION_SETTINGS.write(folder, cast("EvaluationSettings", _merge_settings(before or {}, plain)))
        yield Samples(folder, _read_samples(folder / SAMPLES_NAME), dropped)


def generate(
    samples: Samples,
    generator: Generator,
    candidates: Sequence[Candidate],
    runs: Sequence[TaskRun],
    *,
    on_start: Callable[[str, int, int], object] = lambda _task, _there, _all: None,
    on_done: Callable[[Generation], object] = lambda _said: None,
    on_smaller: Callable[[int], object] = lambda _size: None,
) -> None:
    """Generate what is not there yet, the longest prompts first.

    Args:
        samples: to fill.
        generator: of the answers.
        candidates: who answers.
        runs: what is asked.
        on_start: called with each task, the samples that are there, and those wanted.
        on_done: called with each new answer.
        on_smaller: called with the new batch size when the memory was too small for the old one.

    Raises:
        ValueError: if a sample that is there answers another prompt, or a prompt is longer than the model's context.
    """
    for run in runs:
        prompts = {c.name: [c.prompt(item.request, run.task.prefix) for item in run.items] for c in candidates}
        missing: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for i, item in enumerate(run.items):
            for name in prompts:
                line = samples.lines.get((run.name, name, item.id))
                if line is not None and line["prompt_sha256"] != _prompt_digest(prompts[name][i]):
                    raise ValueError(
                        f"{samples.path} holds an answer of {name} to another prompt for item {item.id} of {run.name}: "
                        f"were data or prompt style changed? If so, {_MOVE_AWAY}"
                    )
            if names := tuple(name for name in prompts if (run.name, name, item.id) not in samples.lines):
                missing[names].append(i)
        wanted = len(run.items) * len(candidates)
        on_start(run.name, wanted - sum(len(names) * len(places) for names, places in missing.items()), wanted)
        for names, places in missing.items():
            longest = [max(each) for each in zip(*(generator.lengths(prompts[name]) for name in names), strict=True)]
            order = sorted(places, key=longest.__getitem__, reverse=True)
            _answer_in_batches(samples, generator, run, prompts, names, order, on_done, on_smaller)


def _answer_in_batches(
    samples: Samples,
    generator: Generator,
    run: TaskRun,
    prompts: Mapping[str, Sequence[Prompt]],
    names: Sequence[str],
    places: Sequence[int],
    on_done: Callable[[Generation], object],
    on_smaller: Callable[[int], object],
) -> None:
    start = 0
    while start < len(places):
        batch = places[start : start + generator.batch_size]

        def keep(name: str, i: int, said: Generation, batch: Sequence[int] = batch) -> None:
            place = batch[i]
            if (run.name, name, run.items[place].id) not in samples.lines:
                samples.add(run.name, name, run.items[place].id, prompts[name][place], said)
                on_done(said)

        try:
            generator(
                {name: [prompts[name][i] for i in batch] for name in names},
                max_new_tokens=run.max_new_tokens,
                stops=run.task.stops,
                on_done=keep,
            )
        except torch.OutOfMemoryError:
            if generator.batch_size == 1:
                raise
            torch.cuda.empty_cache()
            generator.batch_size = max(1, min(generator.batch_size, len(batch)) // 2)
            on_smaller(generator.batch_size)
            continue
        start += len(batch)


def run_settings(
    candidates: Sequence[Candidate], runs: Sequence[TaskRun], generator: GeneratorSettings
) -> EvaluationSettings:
    """Return what :func:`open_samples` guards."""
    return {
        "protocol": PROTOCOL,
        "adapters": {candidate.name: candidate.settings for candidate in candidates},
        "tasks": {run.name: run.settings for run in runs},
        **generator,
    }


def _prompt_digest(prompt: Prompt) -> str:
    return hashlib.sha256(f"{prompt.add_special_tokens}{prompt.text}".encode()).hexdigest()[:16]


def _read_samples(file: Path) -> dict[SampleKey, SampleLine]:
    """Read the lines of the file; one that a crash left unfinished is dropped."""
    if not file.is_file():
        return {}
    found, kept, lines = {}, [], file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for line in lines:
        try:
            entry = from_json(line) if line.endswith("\n") else None
            if entry is not None:
                found[entry["task"], entry["adapter"], entry["item"]] = entry
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    if len(kept) < len(lines):
        write_text(file, "".join(kept))
    return found


def _adapters_with_other_weights(before: EvaluationSettings, now: EvaluationSettings) -> list[str]:
    """Return the adapters of both settings whose weights differ."""
    known = {name: settings.get("weights_sha256") for name, settings in before["adapters"].items()}
    return [name for name, s in now["adapters"].items() if name in known and s.get("weights_sha256") != known[name]]


def _drop_samples(file: Path, adapters: Sequence[str]) -> None:
    lines = [line for line in _read_samples(file).values() if line["adapter"] not in adapters]
    write_text(file, "".join(json.dumps(line) + "\n" for line in lines))


def _conflicts(before: object, now: object, path: str = "") -> Iterator[tuple[str, object, object]]:
    """Give the path of each entry that is in both and differs, with its two values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(set(before) & set(now)):
            yield from _conflicts(before[key], now[key], f"{path}.{key}" if path else key)
    elif before != now:
        yield path, before, now


def _merge_settings(before: object, now: object) -> object:
    if isinstance(before, dict) and isinstance(now, dict):
        return {**before, **{key: _merge_settings(before.get(key), value) for key, value in now.items()}}
    return now


def _shortened(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
