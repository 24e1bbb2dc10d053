"""The commands ``inspect`` and ``compare``: show what adapters hold, and how alike they are.

Bad input ends in one sentence on stderr and exit code 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from seedlora.adapters.adapter import Adapter, locate
from seedlora.adapters.servers import NOT_KNOWN, serving_problems, vllm_rank
from seedlora.cli.terminal import counting_bar, format_numbers, is_unknown, layer_counter, number_table, print_json
from seedlora.merge.inputs import read_adapters, stack_updates, weight_files_of
from seedlora.merge.layers import merge_stacks
from seedlora.merge.registry import make_rule
from seedlora.model.weight_files import WeightFiles
from seedlora.names import FUSED
from seedlora.report.drawing import Palette, standalone
from seedlora.report.figures import weight_figures
from seedlora.report.weights import weight_facts
from seedlora.updates.compression import compress_each
from seedlora.updates.dense import Updates
from seedlora.updates.diagnostics import LayerFacts, layer_facts, model_cosines, module_facts, natural_sort_key
from seedlora.updates.factors import LoRAFactors
from seedlora.utils.files import write_text

#: The rank at which updates of full rank are shown.
_SHOWN_RANK = 64


def _read_adapters(sources: Sequence[str], base: str | None) -> tuple[dict[str, Adapter], WeightFiles]:
    weights = weight_files_of(sources, base)
    with counting_bar() as progress:  # for PiSSA, whose starts take an SVD of every weight
        on_layer = layer_counter(progress, progress.add_task("reading", total=None))
        return read_adapters(sources, base=weights, on_layer=on_layer), weights


def run_inspect(arguments: Mapping[str, Any]) -> None:
    """Show what one adapter holds, and which servers load it."""
    adapters, base = _read_adapters([arguments["adapter"]], arguments["base"])
    ((name, adapter),) = adapters.items()
    stacks, error = _as_factors(stack_updates(adapters, base))
    layers = _all_layer_facts(stacks)
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
    console = Console()
    kind = f"{', '.join(adapter.kinds)}, " if adapter.kinds else ""
    rank = f"rank {', '.join(map(str, ranks))}"
    console.print(f"{name}: {kind}{len(layers)} layers, {rank}, base model {adapter.base_model}", soft_wrap=True)
    table = number_table("module", "layers", "norm", "std", "largest s", "effective rank")
    for row in module_facts(layers):
        updates = [layer.updates[0] for layer in layers if layer.module == row.module]
        std = sum(u.std for u in updates) / len(updates)
        largest = sum((u.singular_values or (0.0,))[0] for u in updates) / len(updates)
        table.add_row(row.module, str(row.layers), *format_numbers(row.norm, std, largest, row.effective_rank))
    console.print(table)
    _print_rank_note(console, error)
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


def run_compare(arguments: Mapping[str, Any]) -> None:
    """Show how alike adapters are, and what a rule would make of them."""
    adapters, base = _read_adapters(arguments["adapters"], arguments["base"])
    stacks, error = _as_factors(stack_updates(adapters, base))
    names = list(adapters)
    merged = merge_stacks(stacks, make_rule(arguments["method"]))
    layers = _all_layer_facts(stacks, merged)
    matrix = model_cosines(stacks).tolist()
    drawn = [] if arguments["plot"] is None else _draw_figures(arguments, stacks, merged, names)
    if arguments["json"]:
        modules = [asdict(row) for row in module_facts(layers)]
        found = {"adapters": names, "cosines": matrix, "modules": modules, "layers": [asdict(f) for f in layers]}
        print_json(found | {"method": arguments["method"], "figures": drawn})
        return
    console = Console()
    table = number_table("cosine", *(str(i + 1) for i in range(len(names))))
    for i, (name, row) in enumerate(zip(names, matrix, strict=True)):
        table.add_row(f"{i + 1} {name}", *format_numbers(*row))
    console.print(table)
    table = number_table("module", "cosine", "rho", "gain", "sign", "norm", "merged", "rank", "merged")
    for row in module_facts(layers):
        facts = [row.mean_cosine, row.rho, row.gain, row.sign_agreement]
        sizes = [row.norm, row.merged_norm or 0.0, row.effective_rank, row.merged_effective_rank or 0.0]
        table.add_row(row.module, *format_numbers(*facts, *sizes))
    console.print(table)
    samples = f"{layers[0].samples} sampled entries per layer"
    console.print(f"merged: with {arguments['method']}; sign: share of equal signs, on {samples}; rank: effective")
    _print_rank_note(console, error)
    for file in drawn:
        console.print(f"drawn: {file}")


def _draw_figures(
    arguments: Mapping[str, Any],
    stacks: Mapping[str, LoRAFactors],
    merged: Mapping[str, LoRAFactors],
    names: Sequence[str],
) -> list[str]:
    """Draw the report's figures of the weights, each as a file."""
    folder, short = Path(arguments["plot"]), [Path(name).name for name in names]
    names = short if len(set(short)) == len(short) else names
    found = weight_facts(stacks, names, merged=FUSED, fused=merged, layers=arguments["layers"])
    drawn = weight_figures(found, Palette(names))
    for name, svg in drawn.items():
        write_text(folder / f"{name}.svg", standalone(svg) + "\n")
    return [str(folder / f"{name}.svg") for name in drawn]


def _all_layer_facts(
    stacks: Mapping[str, LoRAFactors], merged: Mapping[str, LoRAFactors] | None = None
) -> list[LayerFacts]:
    paths = sorted(stacks, key=natural_sort_key)
    with counting_bar() as progress:
        return [
            layer_facts(path, stacks[path], merged=None if merged is None else merged[path])
            for path in progress.track(paths, description="layers")
        ]


def _as_factors(stacks: Mapping[str, Updates]) -> tuple[dict[str, LoRAFactors], float | None]:
    """Return updates as factors, those of full rank at their best approximation, and the largest error of one."""
    shown, worst = {}, None
    with counting_bar() as progress:
        for path, stack in progress.track(stacks.items(), description="reading"):
            if isinstance(stack, LoRAFactors):
                shown[path] = stack
                continue
            shown[path], error = compress_each(stack, min(_SHOWN_RANK, *stack.shape))
            worst = max(error, worst or 0.0)
    return shown, worst


def _print_rank_note(console: Console, error: float | None) -> None:
    if error is not None:
        sentence = f"DoRA's updates have full rank; shown is the best rank {_SHOWN_RANK} of each, relative error"
        console.print(f"{sentence} {error:.3g} at most")
