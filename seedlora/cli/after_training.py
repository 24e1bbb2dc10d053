"""What ``train.py`` scores by generation after training."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.text import Text

from seedlora.adapters.adapter import adapter_sha256
from seedlora.cli.errors import UsageError, one_line
from seedlora.cli.parser import SeedLoRACLI
from seedlora.datamodules import prompts
from seedlora.datamodules.reasoning_gym import generated_test
from seedlora.distributed.sharded import is_partitioned, is_sharded
from seedlora.evaluation.answering import EvaluationSetup
from seedlora.evaluation.candidates import make_candidate
from seedlora.evaluation.generate import StackGenerator
from seedlora.evaluation.harness import check_harness
from seedlora.evaluation.samples import TaskRun
from seedlora.evaluation.sandbox import Sandbox
from seedlora.evaluation.scoring import make_sandbox, score, score_with_harness, task_runs
from seedlora.evaluation.tasks import TASKS, check_tasks
from seedlora.names import BASE, EVALUATION_FOLDER
from seedlora.records.evaluation import GeneratorSettings


@dataclass(frozen=True)
class AskedTasks:
    """What is scored by generation: tasks of ours, and the names of the harness's with its table of them."""

    runs: Sequence[TaskRun] = ()
    sandbox: Sandbox | None = None
    harness: Sequence[str] = ()
    manager: Any = None


def asked_tasks(cli: SeedLoRACLI, console: Console) -> AskedTasks:
    """The tasks that are scored after training, read before it; one that is trained on, by the run's own test split."""
    config = cli.config
    names, harness = (
        [name for name in text.split(",") if name] for text in (config.evaluate.task, config.evaluate.lm_eval)
    )
    own = {f"data.{key}": value for key, value in cli.datamodule.hparams.items()}
    trained_on = str(own.get("data.task"))
    if not (names or harness):
        return AskedTasks()
    if config.evaluate.batch_size < 1:
        raise UsageError(f"--evaluate.batch_size must be at least 1, got {config.evaluate.batch_size}")
    check_tasks(names)
    known = TASKS[trained_on].made_of if trained_on in TASKS else ()
    if seen := [name for name in (*names, *harness) if name.startswith(known)]:
        raise UsageError(
            f"scoring {seen[0]} after training on {trained_on}, whose rows are variants of its test items, would "
            "measure what was seen; evaluate other tasks, or train on other data"
        )

    def generate(task: str, run: Mapping[str, Any] | None) -> Iterable[Mapping[str, Any]]:
        return generated_test(task, own if run is None and task == trained_on else run)

    try:
        with console.status(Text(f"Reading {', '.join((*names, *harness))} ...")):
            runs = task_runs(
                names,
                config.evaluate.task_path,
                limit=config.evaluate.limit,
                max_new_tokens=config.evaluate.max_new_tokens,
                generate=generate,
            )
            sandbox = make_sandbox(runs, execute=config.evaluate.execute_code, trust=False)
            manager = check_harness(harness, config.evaluate.lm_eval_path) if harness else None
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.filename:
            raise
        raise UsageError(str(error)) from None
    return AskedTasks(runs, sandbox, harness, manager)


def evaluate_run(cli: SeedLoRACLI, asked: AskedTasks, console: Console) -> int:
    """Score base, seeds, soup and fused adapter on tasks, stacked over the model in memory.

    Answers of an older merge are replaced. Returns the exit code: what fails here costs neither run nor report.
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
    with cli.callback.holding_tested(module):
        return _evaluate_held(cli, asked, console)


def _evaluate_held(cli: SeedLoRACLI, asked: AskedTasks, console: Console) -> int:
    """Score the adapters that the module holds; returns the exit code."""
    module, ensemble, record = cli.model, cli.ensemble, cli.datamodule.prompt_record()
    adapters, mixtures = module.scored.adapters, module.scored.mixtures
    generator = StackGenerator(
        module.model.get_base_model(),
        module.tokenizer,
        route=module.stack.route,
        frozen=module.stack.frozen,
        adapters=adapters,
        mixtures=mixtures,
        batch_size=cli.config.evaluate.batch_size,
    )
    files = {label: adapter_sha256(folder) for label, folder in ensemble.folders.items()}
    made = [label for label in adapters if label not in (BASE, *files)]
    weights: dict[str, str | list[str] | None] = {**dict.fromkeys(adapters), **files}
    weights |= {label: module.stack.loaded_sha256(label) for label in made}
    weights |= {label: [weights[member] for member in members] for label, members in mixtures.items()}
    candidates = [make_candidate(label, record, prompts, weights_sha256=weights[label]) for label in weights]
    settings: GeneratorSettings = {
        "generator": "transformers",
        "base_model": module.options.base_path,
        "dtype": str(module.options.base_dtype).removeprefix("torch."),
        "quantization": module.options.quantization,
    }
    scored, folder = EvaluationSetup(generator, candidates, settings), ensemble.dirpath / EVALUATION_FOLDER
    without_mixtures = replace(scored, candidates=[c for c in candidates if c.name not in mixtures])
    limit = cli.config.evaluate.limit
    try:
        if asked.runs:
            method = ensemble.method_name
            score(scored, asked.runs, folder, console, sandbox=asked.sandbox, method=method, replace=True)
        if asked.harness:
            score_with_harness(without_mixtures, asked.harness, asked.manager, folder, console, limit=limit)
    except (ValueError, OSError) as error:
        print(f"not scored: {one_line(str(error))}", file=sys.stderr)  # noqa: T201
        return 2 if isinstance(error, ValueError) else 1
    return 0
