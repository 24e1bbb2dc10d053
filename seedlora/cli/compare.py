"""The command ``compare``: show how alike adapters are, and what a rule would make of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from seedlora.cli.command_parser import BASE_HELP, CommandParser, run_command
from seedlora.cli.comparing import compare_with_bar, print_rank_note
from seedlora.cli.terminal import format_numbers, number_table, print_json
from seedlora.merge.adapter_comparison import AdapterComparison
from seedlora.names import FUSED
from seedlora.report.drawing import Palette
from seedlora.report.figures import weight_figures
from seedlora.report.svg import standalone
from seedlora.report.weights import LAYERS, LAYERS_HELP, weight_facts
from seedlora.updates.diagnostics import module_facts
from seedlora.utils.files import write_text
from seedlora.utils.progress import plain_console


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    return run_command(make_parser(), argv, show_comparison)


def make_parser() -> CommandParser:
    """Make the parser of the command."""
    parser = CommandParser("compare", "Show cosines, gains and spectra of several adapters.")
    add = parser.add_argument
    add("adapters", nargs="+", help="PEFT adapter folders or hub ids")
    add("--method", default="seedlora", help="the merge that is shown beside them")
    add("--base", metavar="MODEL", help=BASE_HELP)
    add("--plot", metavar="FOLDER", help="draw cosines, spectra and distributions there")
    add("--layers", default=LAYERS, help=LAYERS_HELP)
    add("--json", action="store_true", help="print every layer as JSON")
    return parser


def show_comparison(arguments: Mapping[str, Any]) -> None:
    """Show how alike adapters are, and what a rule would make of them."""
    compared = compare_with_bar(arguments["adapters"], method=arguments["method"], base=arguments["base"])
    names, layers, matrix = list(compared.adapters), compared.layers, compared.cosines
    drawn = [] if arguments["plot"] is None else _draw_figures(arguments, compared)
    if arguments["json"]:
        modules = [asdict(row) for row in module_facts(layers)]
        found = {"adapters": names, "cosines": matrix, "modules": modules, "layers": [asdict(f) for f in layers]}
        print_json(found | {"method": arguments["method"], "figures": drawn})
        return
    console = plain_console()
    table = number_table("cosine", *(str(i + 1) for i in range(len(names))))
    for i, (name, cosines) in enumerate(zip(names, matrix, strict=True)):
        table.add_row(f"{i + 1} {name}", *format_numbers(*cosines))
    console.print(table)
    table = number_table("module", "cosine", "rho", "gain", "sign", "norm", "merged", "rank", "merged")
    for row in module_facts(layers):
        facts = [row.mean_cosine, row.rho, row.gain, row.sign_agreement]
        sizes = [row.norm, row.merged_norm or 0.0, row.effective_rank, row.merged_effective_rank or 0.0]
        table.add_row(row.module, *format_numbers(*facts, *sizes))
    console.print(table)
    samples = f"{layers[0].samples} sampled entries per layer"
    console.print(f"merged: with {arguments['method']}; sign: share of equal signs, on {samples}; rank: effective")
    print_rank_note(console, compared.rank_error)
    for file in drawn:
        console.print(f"drawn: {file}")


def _draw_figures(arguments: Mapping[str, Any], compared: AdapterComparison) -> list[str]:
    """Draw the report's figures of the weights, each as a file."""
    folder, names = Path(arguments["plot"]), list(compared.adapters)
    short = [Path(name).name for name in names]
    names = short if len(set(short)) == len(short) else names
    found = weight_facts(compared.stacks, names, merged=FUSED, fused=compared.merged or {}, layers=arguments["layers"])
    drawn = weight_figures(found, Palette(names))
    for name, svg in drawn.items():
        write_text(folder / f"{name}.svg", standalone(svg) + "\n")
    return [str(folder / f"{name}.svg") for name in drawn]
