"""The command ``inspect``: show what one adapter holds, and which servers load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from seedlora.adapters.adapter import locate
from seedlora.adapters.servers import NOT_KNOWN, is_unknown, serving_problems, vllm_rank
from seedlora.cli.command_parser import BASE_HELP, CommandParser, run_command
from seedlora.cli.comparing import compare_with_bar, print_rank_note
from seedlora.cli.terminal import format_numbers, number_table, print_json
from seedlora.updates.diagnostics import module_facts
from seedlora.utils.progress import plain_console


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    return run_command(make_parser(), argv, inspect)


def make_parser() -> CommandParser:
    """Make the parser of the command."""
    parser = CommandParser("inspect", "Show ranks, norms and spectra of one adapter, and which servers load it.")
    parser.add_argument("adapter", help="a PEFT adapter folder or hub id")
    parser.add_argument("--base", metavar="MODEL", help=BASE_HELP)
    parser.add_argument("--json", action="store_true", help="print every layer as JSON")
    return parser


def inspect(arguments: Mapping[str, Any]) -> None:
    """Show what one adapter holds, and which servers load it."""
    found = compare_with_bar([arguments["adapter"]], method=None, base=arguments["base"])
    ((name, adapter),), layers = found.adapters.items(), found.layers
    served = serving_problems(locate(name), base=arguments["base"])
    ranks = sorted({factors.rank for factors in adapter.layers.values()})
    if arguments["json"]:
        print_json(
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
    console = plain_console()
    kind = f"{', '.join(adapter.kinds)}, " if adapter.kinds else ""
    rank = f"rank {', '.join(map(str, ranks))}"
    base = f"base model {adapter.base_model}" if adapter.base_model else "names no base model"
    console.print(f"{name}: {kind}{len(layers)} layers, {rank}, {base}", soft_wrap=True)
    table = number_table("module", "layers", "norm", "std", "largest s", "effective rank")
    for row in module_facts(layers):
        updates = [layer.updates[0] for layer in layers if layer.module == row.module]
        std = sum(u.std for u in updates) / len(updates)
        largest = sum((u.singular_values or (0.0,))[0] for u in updates) / len(updates)
        table.add_row(row.module, str(row.layers), *format_numbers(row.norm, std, largest, row.effective_rank))
    console.print(table)
    print_rank_note(console, found.rank_error)
    if adapter.modules or adapter.biases:
        held = [*(["lora_bias"] if adapter.biases else []), *sorted(adapter.modules)]
        console.print(f"besides its updates it holds {', '.join(held)}", soft_wrap=True)
    table = Table("server", "serves it", "what stands in the way")
    for server, reasons in served.items():
        rank_option = f" (--max-lora-rank {vllm_rank(max(ranks))})" if server == "vLLM" else ""
        answer = "not known" if is_unknown(reasons) else "no" if reasons else f"yes{rank_option}"
        table.add_row(server, answer, "\n".join(reasons).removeprefix(NOT_KNOWN))
    console.print(table)
    if any(reasons and not is_unknown(reasons) for reasons in served.values()):
        console.print(
            "python -m seedlora merge of this adapter alone, --method soup, brings what it can into one shape"
        )
