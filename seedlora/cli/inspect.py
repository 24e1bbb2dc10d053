"""The commands for adapters trained anywhere, ``merge``, ``inspect``, ``compare``, ``evaluate``; ``report`` for runs.

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
from seedlora.adapters.servers import NOT_KNOWN, servable, vllm_rank
from seedlora.cli.terminal import formatted, is_unknown, number_table, print_json, progress_bar
from seedlora.merge.inputs import read_adapters, stack_updates, weight_files_of
from seedlora.merge.layers import fuse
from seedlora.merge.registry import make_rule
from seedlora.model.weight_files import WeightFiles
from seedlora.names import FUSED
from seedlora.report.drawing import Palette, standalone
from seedlora.report.figures import weight_figures
from seedlora.report.weights import weight_facts
from seedlora.updates.compression import factored
from seedlora.updates.dense import Updates
from seedlora.updates.diagnostics import LayerFacts, layer_facts, model_cosines, module_facts, natural
from seedlora.updates.factors import LoRAFactors
from seedlora.utils.files import write_text

#: The rank at which updates of full rank are shown.
_SHOWN_RANK = 64


def _read(sources: Sequence[str], base: str | None) -> tuple[dict[str, Adapter], WeightFiles]:
    weights = weight_files_of(sources, base)
    with progress_bar() as progress:  # for PiSSA, whose starts take an SVD of every weight
        task = progress.add_task("reading", total=None)
        return read_adapters(sources, base=weights, on_layer=lambda _path: progress.advance(task)), weights


def run_inspect(arguments: Mapping[str, Any]) -> None:
    """Show what one adapter holds, and which servers load it."""
    adapters, base = _read([arguments["adapter"]], arguments["base"])
    ((name, adapter),) = adapters.items()
    stacks, error = _shown_factors(stack_updates(adapters, base))
    layers = _facts(stacks)
    served = servable(locate(name), base=arguments["base"])
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
        table.add_row(row.module, str(row.layers), *formatted(row.norm, std, largest, row.effective_rank))
    console.print(table)
    _say_shown(console, error)
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
    adapters, base = _read(arguments["adapters"], arguments["base"])
    stacks, error = _shown_factors(stack_updates(adapters, base))
    names = list(adapters)
    merged = fuse(stacks, make_rule(arguments["method"]))
    layers = _facts(stacks, merged)
    matrix = model_cosines(stacks).tolist()
    drawn = [] if arguments["plot"] is None else _plot(arguments, stacks, merged, names)
    if arguments["json"]:
        modules = [asdict(row) for row in module_facts(layers)]
        found = {"adapters": names, "cosines": matrix, "modules": modules, "layers": [asdict(f) for f in layers]}
        print_json(found | {"method": arguments["method"], "figures": drawn})
        return
    console = Console()
    table = number_table("cosine", *(str(i + 1) for i in range(len(names))))
    for i, (name, row) in enumerate(zip(names, matrix, strict=True)):
        table.add_row(f"{i + 1} {name}", *formatted(*row))
    console.print(table)
    table = number_table("module", "cosine", "rho", "gain", "sign", "norm", "merged", "rank", "merged")
    for row in module_facts(layers):
        facts = [row.mean_cosine, row.rho, row.gain, row.sign_agreement]
        sizes = [row.norm, row.merged_norm or 0.0, row.effective_rank, row.merged_effective_rank or 0.0]
        table.add_row(row.module, *formatted(*facts, *sizes))
    console.print(table)
    samples = f"{layers[0].samples} sampled entries per layer"
    console.print(f"merged: with {arguments['method']}; sign: share of equal signs, on {samples}; rank: effective")
    _say_shown(console, error)
    for file in drawn:
        console.print(f"drawn: {file}")


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
    drawn = weight_figures(found, Palette(names))
    for name, svg in drawn.items():
        write_text(folder / f"{name}.svg", standalone(svg) + "\n")
    return [str(folder / f"{name}.svg") for name in drawn]


def _facts(stacks: Mapping[str, LoRAFactors], merged: Mapping[str, LoRAFactors] | None = None) -> list[LayerFacts]:
    paths = sorted(stacks, key=natural)
    with progress_bar() as progress:
        return [
            layer_facts(path, stacks[path], merged=None if merged is None else merged[path])
            for path in progress.track(paths, description="layers")
        ]


def _shown_factors(stacks: Mapping[str, Updates]) -> tuple[dict[str, LoRAFactors], float | None]:
    """The updates as factors; those of full rank at their best approximation, and the largest error of one."""
    shown, worst = {}, None
    with progress_bar() as progress:
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
