"""The commands for adapters trained anywhere, ``merge``, ``inspect``, ``compare``, ``evaluate``; ``report`` for runs.

Bad input ends in one sentence on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from seedlora.adapter import TASKS, Adapter, locate
from seedlora.atomic import write_text
from seedlora.base_weights import BaseWeights
from seedlora.diagnostics import (
    LayerFacts,
    layer_facts,
    model_cosines,
    module_facts,
    natural,
)
from seedlora.evaluation.answering import Prompts
from seedlora.evaluation.command import add_arguments as add_evaluate_arguments
from seedlora.evaluation.command import evaluate
from seedlora.evaluation.tasks import Generate
from seedlora.factors import LoRAFactors
from seedlora.fuse import RECORD_NAME, base_of, fuse, fuse_folders, read_adapters, stack_updates
from seedlora.gguf import convert, gguf_command
from seedlora.into_base import fuse_into_base
from seedlora.merge import COMMON, METHODS, Updates, bind, factored
from seedlora.report.facts import LAYERS, weight_facts
from seedlora.report.figures import colours, standalone, weight_figures
from seedlora.report.page import runs_table, write_comparison, write_report
from seedlora.report.results import FUSED
from seedlora.report.tables import next_commands
from seedlora.serving import NOT_KNOWN, servable, vllm_rank

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Options that only Python can give: functions and generators.
_PYTHON_ONLY = {"generator", "score"}
_LAYERS_HELP = "of the middle, whose entries are counted: attention, ffn, all, or a regular expression"
_BASE_HELP = "the base model, for DoRA, PiSSA, OLoRA and embeddings; default: the one that the adapters name"
#: The rank at which updates of full rank are shown.
_SHOWN_RANK = 64


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
        commands = {"merge": _merge, "inspect": _inspect, "compare": _compare, "methods": _methods}
        commands["report"] = _report
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


def _merge(arguments: Mapping[str, Any]) -> None:
    options = {
        key.removeprefix("option "): _value(text)
        for key, text in arguments.items()
        if key.startswith("option ") and text is not None
    }
    method, sources, out = arguments["method"], arguments["adapters"], Path(arguments["out"])
    bind(method, options)
    if arguments["into_base"] is not None:
        for name, reason in (("dtype", "weights keep the dtype of the base model"), ("gguf", "it converts an adapter")):
            if arguments[name] is not None:
                raise ValueError(f"--{name} is not used with --into-base: {reason}")
        if arguments["base"] not in (None, arguments["into_base"]):
            raise ValueError("--base is not used with --into-base: the base model is the one that is added to")
    with _progress() as progress:
        task = progress.add_task(f"{method}", total=None)
        on_layer = lambda _path: progress.advance(task)  # noqa: E731
        if arguments["into_base"] is not None:
            fuse_into_base(sources, arguments["into_base"], out, method=method, options=options, on_layer=on_layer)
        else:
            dtype = DTYPES.get(arguments["dtype"] or "")
            base = arguments["base"]
            fuse_folders(sources, out, method=method, options=options, dtype=dtype, base=base, on_layer=on_layer)
    record = json.loads((out / RECORD_NAME).read_text(encoding="utf-8"))
    converted = None if arguments["gguf"] is None else convert(out, record["base_model"], Path(arguments["gguf"]))
    served = {} if arguments["into_base"] is not None else servable(out, base=arguments["base"])
    if arguments["json"]:
        _print_json(record | {"out": str(out), "servable": served, "gguf": str(converted) if converted else None})
        return
    console = Console()
    what = "1 adapter" if len(sources) == 1 else f"{len(sources)} adapters"
    console.print(f"{what} fused with [bold]{method}[/bold] into {out}", soft_wrap=True)
    if kinds := record.get("kinds"):
        console.print(f"kinds of the inputs: {', '.join(kinds)}")
    if averaged := record.get("averaged"):
        console.print(f"averaged, not fused by {method}: {', '.join(averaged)}", soft_wrap=True)
    if "dequantised" in record:
        console.print(f"the base model was stored quantised by {record['dequantised']}; the result is dequantised")
    if arguments["into_base"] is None:
        config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
        console.print(f"rank {config['r']}, lora_alpha {config['lora_alpha']}; {', '.join(config['target_modules'])}")
        loads = next_commands(
            base_model=record["base_model"],
            adapter=out,
            rank=config["r"],
            serve=not served["vLLM"],
            auto_class=TASKS.get(config["task_type"], "AutoPeftModel"),
        )
        print(loads)  # noqa: T201 - to be copied
        console.print(_served_line(served, config["r"]), soft_wrap=True)
    if "inputs_compressed" in record:
        largest = record["inputs_compressed"]["relative_error_max"]
        console.print(
            f"{method} works on factors: each input was compressed first, relative error {largest:.3g} at most"
        )
    if "compression" in record:
        mean, largest = (record["compression"][f"relative_error_{key}"] for key in ("mean", "max"))
        exact = "" if arguments["into_base"] else "; --into-base MODEL adds the update to the weights as it is"
        console.print(
            f"compressed: relative Frobenius error {mean:.3g} on average, {largest:.3g} at most{exact}", soft_wrap=True
        )
    if missing := record.get("incomplete_groups"):
        console.print(f"some servers want these layers too, but their shape is unknown: {', '.join(missing[:4])}, ...")
    if converted is not None:
        console.print(f"converted: {converted}", soft_wrap=True)
    elif arguments["gguf"] is not None:
        console.print(f"no convert_lora_to_gguf.py in {arguments['gguf']}; where llama.cpp is, run:", soft_wrap=True)
        print(shlex.join(gguf_command(out, record["base_model"], Path("."))))  # noqa: T201 - to be copied


def _read(sources: Sequence[str], base: str | None) -> tuple[dict[str, Adapter], BaseWeights]:
    weights = base_of(sources, base)
    with _progress() as progress:  # for PiSSA, whose starts take an SVD of every weight
        task = progress.add_task("reading", total=None)
        return read_adapters(sources, base=weights, on_layer=lambda _path: progress.advance(task)), weights


def _inspect(arguments: Mapping[str, Any]) -> None:
    adapters, base = _read([arguments["adapter"]], arguments["base"])
    ((name, adapter),) = adapters.items()
    stacks, error = _shown_factors(stack_updates(adapters, base))
    layers = _facts(stacks)
    served = servable(locate(name), base=arguments["base"])
    ranks = sorted({factors.rank for factors in adapter.layers.values()})
    if arguments["json"]:
        _print_json(
            {
                "adapter": name,
                "base_model": adapter.base_model,
                "ranks": ranks,
                "kinds": adapter.kinds,
                "servable": served,
            }
            | {"layers": [asdict(f) for f in layers]}
        )
        return
    console = Console()
    kind = f"{', '.join(adapter.kinds)}, " if adapter.kinds else ""
    rank = f"rank {', '.join(map(str, ranks))}"
    console.print(f"{name}: {kind}{len(layers)} layers, {rank}, base model {adapter.base_model}", soft_wrap=True)
    table = _table("module", "layers", "norm", "std", "largest s", "effective rank")
    for row in module_facts(layers):
        updates = [layer.updates[0] for layer in layers if layer.module == row.module]
        std = sum(u.std for u in updates) / len(updates)
        largest = sum((u.singular_values or (0.0,))[0] for u in updates) / len(updates)
        table.add_row(row.module, str(row.layers), *_numbers(row.norm, std, largest, row.effective_rank))
    console.print(table)
    _say_shown(console, error)
    if adapter.modules or adapter.biases:
        held = [*(["lora_bias"] if adapter.biases else []), *sorted(adapter.modules)]
        console.print(f"besides its updates it holds {', '.join(held)}", soft_wrap=True)
    table = Table("server", "serves it", "what stands in the way")
    for server, reasons in served.items():
        rank_option = f" (--max-lora-rank {vllm_rank(max(ranks))})" if server == "vLLM" else ""
        answer = "not known" if _not_known(reasons) else "no" if reasons else f"yes{rank_option}"
        table.add_row(server, answer, "\n".join(reasons).removeprefix(NOT_KNOWN))
    console.print(table)
    if any(reasons and not _not_known(reasons) for reasons in served.values()):
        console.print(
            "python -m seedlora merge of this adapter alone, --method soup, brings what it can into one shape"
        )


def _compare(arguments: Mapping[str, Any]) -> None:
    adapters, base = _read(arguments["adapters"], arguments["base"])
    stacks, error = _shown_factors(stack_updates(adapters, base))
    names = list(adapters)
    merged = fuse(stacks, bind(arguments["method"]))
    layers = _facts(stacks, merged)
    matrix = model_cosines(stacks).tolist()
    drawn = [] if arguments["plot"] is None else _plot(arguments, stacks, merged, names)
    if arguments["json"]:
        modules = [asdict(row) for row in module_facts(layers)]
        found = {"adapters": names, "cosines": matrix, "modules": modules, "layers": [asdict(f) for f in layers]}
        _print_json(found | {"method": arguments["method"], "figures": drawn})
        return
    console = Console()
    table = _table("cosine", *(str(i + 1) for i in range(len(names))))
    for i, (name, row) in enumerate(zip(names, matrix, strict=True)):
        table.add_row(f"{i + 1} {name}", *_numbers(*row))
    console.print(table)
    table = _table("module", "cosine", "rho", "gain", "sign", "norm", "merged", "rank", "merged")
    for row in module_facts(layers):
        facts = [row.mean_cosine, row.rho, row.gain, row.sign_agreement]
        sizes = [row.norm, row.merged_norm or 0.0, row.effective_rank, row.merged_effective_rank or 0.0]
        table.add_row(row.module, *_numbers(*facts, *sizes))
    console.print(table)
    samples = f"{layers[0].samples} sampled entries per layer"
    console.print(f"merged: with {arguments['method']}; sign: share of equal signs, on {samples}; rank: effective")
    _say_shown(console, error)
    for file in drawn:
        console.print(f"drawn: {file}")


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
        _print_json({"methods": rows, "common options": dict(COMMON)})
        return
    console = Console()
    table = Table("method", "formula", "options and defaults", "source")
    for name, method in METHODS.items():
        options = [f"{key}={_shown(value)}" for key, value in method.options.items() if key != "generator"]
        table.add_row(name, method.formula, "\n".join(options), method.source)
    console.print(table)
    console.print("all: " + ", ".join(f"{key}={value}" for key, value in COMMON.items()))


def _report(arguments: Mapping[str, Any]) -> None:
    runs = [Path(run) for run in arguments["runs"]]
    if missing := [run for run in runs if not (run / "run.json").is_file()]:
        raise ValueError(f"{missing[0]} holds no run: it has no run.json")
    if repeated := [run for i, run in enumerate(runs) if run.resolve() in [other.resolve() for other in runs[:i]]]:
        raise ValueError(f"{repeated[0]} is given twice")
    found = []
    with _progress() as progress:
        for run in runs:
            task = progress.add_task(run.name, total=None)
            advance = lambda _path: progress.advance(task)  # noqa: B023, E731 - called now
            found.append(write_report(run, layers=arguments["layers"], on_layer=advance))
    several = write_comparison(found, runs, arguments["out"]) if len(runs) > 1 else None
    if arguments["json"]:
        _print_json(several or found[0])
        return
    console = Console()
    for run, facts in zip(runs, found, strict=True):
        console.print(f"{run}: {facts['verdict']}", highlight=False, markup=False, soft_wrap=True)
        for sentence in (*facts["advice"]["sentences"], *facts["left_out"], *facts["missing"]):
            console.print(f"  {sentence}", highlight=False, markup=False, soft_wrap=True)
    if several is not None:
        # The page has all columns; these fit into a terminal.
        rows, shown = runs_table(several["runs"]), ("run", "method", "mean seed", "fused", "against mean seed")
        table = _table(*shown)
        for row in rows.rows:
            table.add_row(*(row[rows.header.index(name)] for name in shown))
        console.print(table)
        console.print(several["verdict"], highlight=False, markup=False, soft_wrap=True)
    for folder in [*runs, *([] if several is None else [Path(arguments["out"])])]:
        console.print(f"report: {folder / 'report.html'}", highlight=False, soft_wrap=True)


def _plot(
    arguments: Mapping[str, Any],
    stacks: Mapping[str, LoRAFactors],
    merged: Mapping[str, LoRAFactors],
    names: Sequence[str],
) -> list[str]:
    """Draw the report's figures of the weights, each as a file."""
    folder, short = Path(arguments["plot"]), [Path(name).name for name in names]
    names = short if len(set(short)) == len(short) else names
    found = weight_facts(stacks, names, merged=FUSED, fused=merged, layers=arguments["layers"])
    drawn = weight_figures(found, colours(names))
    for name, svg in drawn.items():
        write_text(folder / f"{name}.svg", standalone(svg) + "\n")
    return [str(folder / f"{name}.svg") for name in drawn]


def _facts(stacks: Mapping[str, LoRAFactors], merged: Mapping[str, LoRAFactors] | None = None) -> list[LayerFacts]:
    paths = sorted(stacks, key=natural)
    with _progress() as progress:
        return [
            layer_facts(path, stacks[path], merged=None if merged is None else merged[path])
            for path in progress.track(paths, description="layers")
        ]


def _shown_factors(stacks: Mapping[str, Updates]) -> tuple[dict[str, LoRAFactors], float | None]:
    """The updates as factors; those of full rank at their best approximation, and the largest error of one."""
    shown, worst = {}, None
    with _progress() as progress:
        for path, stack in progress.track(stacks.items(), description="reading"):
            if isinstance(stack, LoRAFactors):
                shown[path] = stack
                continue
            shown[path], error = factored(stack, min(_SHOWN_RANK, *stack.shape))
            worst = max(error, worst or 0.0)
    return shown, worst


def _say_shown(console: Console, error: float | None) -> None:
    if error is not None:
        sentence = f"DoRA's updates have full rank; shown is the best rank {_SHOWN_RANK} of each, relative error"
        console.print(f"{sentence} {error:.3g} at most")


def _served_line(served: Mapping[str, Sequence[str]], rank: int) -> str:
    """Which servers load the adapter, and why others do not."""
    good = [server for server, reasons in served.items() if not reasons]
    limit = f" (vLLM: --max-lora-rank {vllm_rank(rank)})" if "vLLM" in good else ""
    parts = [f"served by {', '.join(good)}{limit}"] if good else []
    bad: dict[str, list[str]] = {}
    for server, reasons in served.items():
        if reasons:
            bad.setdefault("; ".join(reasons), []).append(server)
    for reason, servers in bad.items():
        how = "not known for" if reason.startswith(NOT_KNOWN) else "not by"
        parts.append(f"{how} {', '.join(servers)} ({reason.removeprefix(NOT_KNOWN)})")
    return "; ".join(parts)


def _not_known(reasons: Sequence[str]) -> bool:
    return any(reason.startswith(NOT_KNOWN) for reason in reasons)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _table(*columns: str) -> Table:
    """A table of names and numbers; only a long name, a path, is folded."""
    table = Table()
    for i, column in enumerate(columns):
        table.add_column(column, overflow="fold", justify="left" if i == 0 else "right", no_wrap=i > 0)
    table.columns[0].min_width = 9
    return table


def _numbers(*values: float) -> list[str]:
    return [f"{value:.3g}" for value in values]


def _value(text: str) -> Any:
    """A word of the command line as JSON if it is JSON, else as text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _shown(value: object) -> object:
    return "required" if value is inspect.Parameter.empty else value


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, default=str))  # noqa: T201 - what --json asks for
