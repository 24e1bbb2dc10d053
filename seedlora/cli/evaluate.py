"""The command ``evaluate``: score adapters on tasks by what they generate."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from seedlora.adapters.adapter import PROMPT_NAME
from seedlora.cli.command_parser import CommandParser, run_command
from seedlora.datamodules import prompts
from seedlora.evaluation.answering import DTYPES, EvaluationSetup, Participants, from_endpoint, from_folders
from seedlora.evaluation.candidates import DEFAULT_STYLE
from seedlora.evaluation.harness import PROTOCOL as HARNESS_PROTOCOL
from seedlora.evaluation.harness import check_harness
from seedlora.evaluation.scoring import make_sandbox, score, score_with_harness, task_runs, with_common_limit
from seedlora.evaluation.tasks import PROTOCOL, TASKS
from seedlora.records.evaluation import EvaluationResults, HarnessResults
from seedlora.utils.progress import plain_console


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    return run_command(make_parser(), argv, evaluate)


def make_parser() -> CommandParser:
    """Make the parser of the command."""
    parser = CommandParser("evaluate", "Score adapters on tasks by what they generate.")
    add = parser.add_argument
    add("--adapter", action="append", default=[], metavar="[NAME=]DIR", help="a PEFT folder or hub id; repeat it")
    add("--task", default="", metavar="A,B", help=f"from {', '.join(TASKS)}")
    add("--limit", type=int, help="only the first N items of each task")
    add("--out", default="evaluation", help="folder of samples and results; what is there is not generated again")
    add("--base_model", help="default: what the adapters name")
    add("--with_base", action="store_true", help="score the base model too")
    add("--against", metavar="NAME", help="compare all with this one; default: merged with mean seed, or the first")
    add("--joint", action="store_true", help="also over all tasks together, and relative to adapters named like tasks")
    add("--json", action="store_true", help="print the results as JSON")
    data = parser.add_argument_group("tasks")
    add = data.add_argument
    add("--task_path", action="append", default=[], metavar="[TASK=]PATH", help="a file, a mirrored folder, or 'hub'")
    add("--prompt_style", help=f"for adapters without a {PROMPT_NAME}; default: {DEFAULT_STYLE}")
    add("--max_new_tokens", type=int, help="instead of the protocol's; the results then say so")
    add("--execute_code", action="store_true", help="run generated code, inside bubblewrap, to score it")
    add("--without_sandbox", action="store_true", help="accept the risk of running it without bubblewrap")
    harness = parser.add_argument_group("protocol lm-eval", "lm-evaluation-harness: pip install lm-eval")
    add = harness.add_argument
    add("--lm_eval", default="", metavar="A,B", help="tasks of the harness: mmlu, bbh, truthfulqa_mc2, ...")
    add("--lm_eval_path", metavar="DIR", help="a folder with YAML files of tasks of your own")
    work = parser.add_argument_group("generation")
    add = work.add_argument
    add("--batch_size", type=int, default=16, help="items in one forward; each adapter answers all of them")
    add("--dtype", choices=list(DTYPES), default="auto", help="of the base model")
    add("--endpoint", metavar="URL", help="a completions server; the model's name there is the adapter's here")
    add("--concurrency", type=int, default=16, help="requests at once")
    add("--timeout", type=float, default=600.0, help="seconds for one request")
    return parser


def evaluate(arguments: Mapping[str, Any]) -> None:
    """Score adapters on tasks.

    Args:
        arguments: of :func:`make_parser`.

    Raises:
        ValueError: for a request that cannot be carried out.
        OSError: if data, model or server cannot be reached.
    """
    names, harness = (_split_names(arguments[key]) for key in ("task", "lm_eval"))
    if not names and not harness:
        raise ValueError(f"--task is missing; choose from {', '.join(TASKS)}")
    if harness and arguments["endpoint"]:
        raise ValueError("--lm_eval scores a model in this process; give --endpoint in a run of its own")
    _check_options_used(arguments)
    if not arguments["adapter"] and not arguments["base_model"]:
        raise ValueError("give at least one --adapter, or a --base_model to score alone")
    console = plain_console(stderr=True) if arguments["json"] else plain_console()
    runs = task_runs(
        names,
        _task_paths(arguments["task_path"], names),
        limit=arguments["limit"],
        max_new_tokens=arguments["max_new_tokens"],
        generate=_generated_test,
    )
    if arguments["joint"]:
        runs = with_common_limit(runs)
    harness_path = Path(arguments["lm_eval_path"]) if arguments["lm_eval_path"] else None
    manager = check_harness(harness, harness_path) if harness else None
    sandbox = make_sandbox(runs, execute=arguments["execute_code"], trust=arguments["without_sandbox"])
    setup = _set_up(arguments, console)
    against = arguments["against"]
    if against is not None and against not in (known := [c.name for c in setup.candidates]):
        raise ValueError(f"--against '{against}' is not scored; there are {', '.join(known)}")
    out = Path(arguments["out"])
    found: dict[str, EvaluationResults | HarnessResults] = {}
    if runs:
        try:
            found[PROTOCOL] = score(
                setup, runs, out, console, sandbox=sandbox, against=against, together=arguments["joint"]
            )
        except KeyboardInterrupt:
            raise OSError("interrupted; the answers so far are kept: the same command goes on from them") from None
        if arguments["limit"] is not None:
            console.print("all items: the same without --limit; these answers are kept", highlight=False)
    if harness:
        found[HARNESS_PROTOCOL] = score_with_harness(setup, harness, manager, out, console, limit=arguments["limit"])
    if arguments["json"]:
        print(json.dumps(found, indent=2))  # noqa: T201 - what --json asks for


def _generated_test(task: str, run: Mapping[str, Any] | None) -> Iterable[Mapping[str, Any]]:
    """Return the test items of a task that is generated."""
    from seedlora.datamodules.reasoning_gym import generated_test  # it brings Lightning, which other tasks do not need

    return generated_test(task, run)


def _set_up(arguments: Mapping[str, Any], console: Console) -> EvaluationSetup:
    """Set up what answers: the models of a server, or adapter folders in this process."""
    participants = Participants(
        adapters=arguments["adapter"],
        base_model=arguments["base_model"],
        with_base=arguments["with_base"],
        prompt_style=arguments["prompt_style"],
    )
    if arguments["endpoint"]:
        with console.status(Text(f"Asking {arguments['endpoint']} which models it has ...")):
            return from_endpoint(
                participants,
                prompts,
                url=arguments["endpoint"],
                concurrency=arguments["concurrency"],
                timeout=arguments["timeout"],
            )
    return from_folders(participants, prompts, console, dtype=arguments["dtype"], batch_size=arguments["batch_size"])


#: Options that the harness, which has its own ways, does not read.
_TASK_OPTIONS = ("task_path", "prompt_style", "max_new_tokens", "execute_code", "without_sandbox", "against", "joint")


def _check_options_used(arguments: Mapping[str, Any]) -> None:
    """Raise ValueError for an option that is given and that nothing of what is asked for would read."""
    parser = make_parser()
    idle: dict[str, Sequence[str]] = {
        "--endpoint asks a server, which has its own": ("dtype", "batch_size") if arguments["endpoint"] else (),
        "only --endpoint reads it": () if arguments["endpoint"] else ("concurrency", "timeout"),
        "only --task reads it": () if arguments["task"] else _TASK_OPTIONS,
        "only --lm_eval reads it": () if arguments["lm_eval"] else ("lm_eval_path",),
    }
    for reason, keys in idle.items():
        if given := [key for key in keys if arguments[key] != parser.get_default(key)]:
            raise ValueError(f"--{given[0]} would change nothing: {reason}")


def _task_paths(pairs: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Read ``TASK=PATH`` pairs; a path alone is that of the only task."""
    found = {}
    for pair in pairs:
        task, equals, path = pair.partition("=")
        if not equals or (task not in TASKS and Path(pair).expanduser().exists()):
            if len(names) != 1:
                raise ValueError(f"--task_path '{pair}' must be TASK=PATH where there is more than one task")
            task, path = names[0], pair
        found[task] = path
    return found


def _split_names(text: str) -> list[str]:
    return [word for word in text.replace(" ", ",").split(",") if word]
