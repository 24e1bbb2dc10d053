"""``python -m seedlora``: its commands and their options."""

from __future__ import annotations

import argparse
import inspect
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

from seedlora.cli.doctor import add_arguments as add_doctor_arguments
from seedlora.cli.doctor import run_doctor
from seedlora.cli.evaluate import add_arguments as add_evaluate_arguments
from seedlora.cli.evaluate import evaluate
from seedlora.cli.export import add_arguments as add_export_arguments
from seedlora.cli.export import run_export
from seedlora.cli.inspect import run_compare, run_inspect
from seedlora.cli.merge import DTYPES, run_merge
from seedlora.cli.push import add_arguments as add_push_arguments
from seedlora.cli.push import run_push
from seedlora.cli.report import run_report
from seedlora.cli.serve import add_arguments as add_serve_arguments
from seedlora.cli.serve import run_serve
from seedlora.cli.terminal import print_json
from seedlora.evaluation.answering import Prompts
from seedlora.evaluation.tasks import Generate
from seedlora.merge.bound_rule import COMMON
from seedlora.merge.registry import METHODS
from seedlora.report.weights import LAYERS

#: Options that only Python can give: functions and generators.
_PYTHON_ONLY = {"generator", "score"}
_LAYERS_HELP = "of the middle, whose entries are counted: attention, ffn, all, or a regular expression"
_BASE_HELP = "the base model, for DoRA, PiSSA, OLoRA and embeddings; default: the one that the adapters name"


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one sentence, and which takes no option by half its name."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None, *, prompts: Prompts | None = None, generate: Generate | None = None) -> int:
    """Run one command.

    Args:
        argv: its words. Default: those of the process.
        prompts: the prompt styles, for ``evaluate``.
        generate: makes the rows of generated tasks, for ``evaluate``.

    Returns:
        0, or 2 if the input is bad: a sentence on stderr then says what was asked, given and allowed.
    """
    # PEFT imports it, and it says what would make it faster.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        arguments = vars(_parser().parse_args(argv))
        commands = {"merge": run_merge, "inspect": run_inspect, "compare": run_compare, "methods": _methods}
        commands |= {
            "report": run_report,
            "export": run_export,
            "push": run_push,
            "serve": run_serve,
            "doctor": run_doctor,
        }
        if (name := arguments.pop("command")) == "evaluate":
            evaluate(arguments, prompts, generate)
        else:
            commands[name](arguments)
    except (ValueError, OSError) as error:
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)
        print(f"error: {' '.join(reason.split())}", file=sys.stderr)  # noqa: T201 - stderr is this module's
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m seedlora",
        description="Fuse, inspect and compare LoRA adapters.",
        epilog="python -m seedlora preview --data NAME shows rows of a data set as a model will see them.",
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    merge = commands.add_parser("merge", help="fuse adapters into one, or into the base model")
    merge.add_argument("adapters", nargs="+", help="PEFT adapter folders or hub ids")
    merge.add_argument("--method", default="seedlora", help="see: python -m seedlora methods")
    merge.add_argument("--out", required=True, help="the folder to write; only an older result is replaced")
    merge.add_argument("--dtype", choices=sorted(DTYPES), help="of the result; default: that of the adapters")
    merge.add_argument("--into-base", metavar="MODEL", help="add the result to this model folder's weights instead")
    merge.add_argument("--base", metavar="MODEL", help=_BASE_HELP)
    merge.add_argument(
        "--gguf", metavar="LLAMA_CPP", help="also convert the result with llama.cpp's script, found there"
    )
    merge.add_argument("--json", action="store_true", help="print the record as JSON")
    options = merge.add_argument_group("options of the methods", "python -m seedlora methods says which has which")
    for name in sorted(_option_names()):
        options.add_argument(f"--{name.replace('_', '-')}", f"--{name}", dest=f"option {name}", metavar="VALUE")

    inspect_ = commands.add_parser("inspect", help="ranks, norms and spectra of one adapter")
    inspect_.add_argument("adapter", help="a PEFT adapter folder or hub id")
    inspect_.add_argument("--base", metavar="MODEL", help=_BASE_HELP)
    inspect_.add_argument("--json", action="store_true", help="print every layer as JSON")

    compare = commands.add_parser("compare", help="cosines, gains and spectra of several adapters")
    compare.add_argument("adapters", nargs="+", help="PEFT adapter folders or hub ids")
    compare.add_argument("--method", default="seedlora", help="the merge that is shown beside them")
    compare.add_argument("--base", metavar="MODEL", help=_BASE_HELP)
    compare.add_argument("--plot", metavar="FOLDER", help="draw cosines, spectra and distributions there")
    compare.add_argument("--layers", default=LAYERS, help=_LAYERS_HELP)
    compare.add_argument("--json", action="store_true", help="print every layer as JSON")

    add_evaluate_arguments(commands.add_parser("evaluate", help="score adapters on tasks: GSM8K, MATH, HumanEval, ..."))

    add_export_arguments(commands.add_parser("export", help="write an adapter for llama.cpp and Ollama"))
    add_push_arguments(commands.add_parser("push", help="send an adapter to the model hub"))
    add_serve_arguments(commands.add_parser("serve", help="start vLLM or llama.cpp for a run or an adapter"))
    add_doctor_arguments(commands.add_parser("doctor", help="what is installed and what works, for a bug report"))

    report = commands.add_parser("report", help="rebuild the report of runs, and compare several")
    report.add_argument("runs", nargs="+", help="folders of runs of train.py")
    report.add_argument("--layers", default=LAYERS, help=_LAYERS_HELP)
    report.add_argument("--out", default="comparison", help="folder of the comparison of several runs")
    report.add_argument("--json", action="store_true", help="print what is in report.json")

    methods = commands.add_parser("methods", help="the table of merge methods")
    methods.add_argument("--json", action="store_true", help="print it as JSON")
    return parser


def _option_names() -> set[str]:
    return {key for method in METHODS.values() for key in method.options} - _PYTHON_ONLY | set(COMMON)


def _methods(arguments: Mapping[str, Any]) -> None:
    if arguments["json"]:
        rows = {
            name: {
                "formula": method.formula,
                "source": method.source,
                "options": {key: _shown(value) for key, value in method.options.items()},
            }
            for name, method in METHODS.items()
        }
        print_json({"methods": rows, "common options": dict(COMMON)})
        return
    console = Console()
    table = Table("method", "formula", "options and defaults", "source")
    for name, method in METHODS.items():
        options = [f"{key}={_shown(value)}" for key, value in method.options.items() if key != "generator"]
        table.add_row(name, method.formula, "\n".join(options), method.source)
    console.print(table)
    console.print("all: " + ", ".join(f"{key}={value}" for key, value in COMMON.items()))


def _shown(value: object) -> object:
    return "required" if value is inspect.Parameter.empty else value
