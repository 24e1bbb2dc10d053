"""Run lm-evaluation-harness on a model in memory, protocol ``lm-eval``: its own tasks, prompts and scores.

Nothing of the process is disturbed: the harness is told not to seed anything, the random states are put back anyway,
the model's train mode returns, and the tokenizer it changes is a copy.
"""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from seedlora.evaluation.generate import StackGenerator
from seedlora.model.loading import eval_mode

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

PROTOCOL = "lm-eval"


@dataclass(frozen=True)
class Measured:
    """A metric of a task: its value and its standard error, if the harness gives one."""

    value: float
    stderr: float | None


#: Adapter to task to metric.
Scores = dict[str, dict[str, dict[str, Measured]]]


def check_harness(tasks: Sequence[str], folder: Path | None = None) -> TaskManager:
    """Make the harness's table of tasks, once for all adapters, and check that it has those asked for.

    Args:
        tasks: names of tasks or groups.
        folder: with YAML files of tasks of your own. If it has all that are asked for, the harness's 10,000 files are
            not read, which takes seconds.

    Raises:
        ValueError: if the harness is not installed, has no such task, or would run generated code for one.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ValueError(f"{tasks[0]} needs lm-evaluation-harness: pip install lm-eval") from None
    if folder is not None and not folder.is_dir():
        raise ValueError(f"{folder} is no folder with tasks of lm-evaluation-harness")
    for defaults in (False, True):
        if defaults or folder is not None:
            manager = TaskManager(include_path=None if folder is None else str(folder), include_defaults=defaults)
            missing = [task for task in tasks if not manager.match_tasks([task])]
            if not missing:
                _check_code(tasks, manager)
                return manager
    raise ValueError(f"lm-evaluation-harness has no task '{missing[0]}'; lm-eval ls tasks lists them")


def _check_code(tasks: Sequence[str], manager: TaskManager) -> None:
    """Raise ValueError for a task that runs what the model wrote; the harness itself refuses only when it starts."""

    def runs_code(asked: str | Mapping[str, Any]) -> bool:
        entry = manager.task_index.get(asked) if isinstance(asked, str) else None
        config = asked if isinstance(asked, Mapping) else (entry.cfg if entry is not None else None) or {}
        parts = config.get("task", [])
        if isinstance(parts, str):  # a task of a group may be one of the table with changes
            parts = [parts] if isinstance(asked, Mapping) else []
        members = [*parts, *(entry.tags if entry is not None and entry.cfg is None else ())]
        return bool(config.get("unsafe_code")) or any(map(runs_code, members))

    for task in tasks:
        if any(map(runs_code, manager.match_tasks([task]))):
            raise ValueError(
                f"lm-eval's {task} runs generated code outside a sandbox; score our tasks humaneval and mbpp "
                "with execute_code instead"
            )


def harness_scores(
    generator: StackGenerator,
    names: Sequence[str],
    tasks: Sequence[str],
    manager: TaskManager,
    *,
    limit: int | None = None,
    on_adapter: Callable[[str], object] = lambda _name: None,
) -> Scores:
    """Score adapters, one after the other, on tasks of the harness.

    Args:
        generator: holds model, tokenizer and adapters.
        names: of the adapters.
        tasks: names of tasks or groups.
        manager: of :func:`check_harness`.
        limit: only so many documents of each task.
        on_adapter: called before each.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    found: Scores = {}
    with _restoring_random_states(), eval_mode(generator.model):
        for name in names:
            on_adapter(name)
            generator.route([name])
            model = HFLM(
                pretrained=generator.model,
                tokenizer=copy.deepcopy(generator.tokenizer),
                batch_size=generator.batch_size,
            )
            answer = lm_eval.simple_evaluate(
                model,
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                log_samples=False,
                bootstrap_iters=1000,
                random_seed=None,
                numpy_random_seed=None,
                torch_random_seed=None,
            )
            found[name] = {task: _metrics_of(entry) for task, entry in answer["results"].items()}
    return found


def _metrics_of(entry: Mapping[str, object]) -> dict[str, Measured]:
    """Turn the harness's keys ``acc,none`` and ``acc_stderr,none`` into metrics by name."""
    values = {}
    for key, value in entry.items():
        metric, _, filter_ = key.partition(",")
        if filter_ and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = entry.get(f"{metric}_stderr,{filter_}")
            label = metric if filter_ == "none" else f"{metric} ({filter_})"
            values[label] = Measured(float(value), error if isinstance(error, int | float) else None)
    return values


@contextmanager
def _restoring_random_states() -> Iterator[None]:
    """Put the random states back after the block, and keep the harness silent about itself inside."""
    from lm_eval import evaluator

    logger = logging.getLogger("lm_eval")
    level, python, arrays = logger.level, random.getstate(), np.random.get_state()
    logger.setLevel(logging.ERROR)
    # It asks git for the commit of the user's folder, which nobody reads, and git complains to the terminal.
    commit, evaluator.get_git_commit_hash = evaluator.get_git_commit_hash, lambda: None
    devices = list(range(torch.cuda.device_count()))
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
        logger.setLevel(level)
        evaluator.get_git_commit_hash = commit
