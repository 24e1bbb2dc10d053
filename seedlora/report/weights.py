"""Describe what the weights of seeds and fused adapter look like."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from seedlora.merge.methods.soup import soup
from seedlora.merge.registry import make_rule
from seedlora.names import FUSED, SOUP
from seedlora.records.report import Distributions, LayerRow, ModuleRow, WeightRecord
from seedlora.updates.diagnostics import (
    LayerFacts,
    ModuleFacts,
    UpdateFacts,
    histogram,
    layer_facts,
    module_facts,
    natural_sort_key,
    update_facts,
)
from seedlora.updates.factors import LoRAFactors

#: Entries of every layer that the agreement of signs is measured on.
SAMPLES = 4096
BINS, SPREADS = 61, 4.0
#: Whose entries the distributions are made of: the paper's figure is of attention.
LAYERS = "attention"
#: What that option takes.
LAYERS_HELP = "of the middle, whose entries are counted: attention, ffn, all, or a regular expression"


def weight_facts(
    stacks: Mapping[str, LoRAFactors],
    seeds: Sequence[str],
    *,
    merged: str | None,
    fused: Mapping[str, LoRAFactors],
    layers: str = LAYERS,
    on_layer: Callable[[str], object] = lambda _path: None,
) -> WeightRecord:
    """Describe adapters by their cosines, spectra, distributions and gains.

    Args:
        stacks: the adapters of every layer by path.
        seeds: their labels.
        merged: the label of what was made of them, if anything was; plain soup is drawn under its own name.
        fused: that adapter.
        layers: as in :func:`seedlora.report.facts.facts`.
        on_layer: called with each layer's path when it is done.
    """
    paths = sorted(stacks, key=natural_sort_key)
    found = []
    for path in paths:
        found.append(layer_facts(path, stacks[path], merged=fused.get(path), samples=SAMPLES))
        on_layer(path)
    middle = found[len(found) // 2]
    drawn = [*seeds, *([SOUP] if len(seeds) > 1 else []), *([FUSED] if merged == FUSED else [])]
    spectra = [
        *middle.updates,
        *(update_facts(soup(stacks[middle.path])) if SOUP in drawn else ()),
        *([middle.merged] if merged == FUSED and middle.merged is not None else []),
    ]
    return {
        "seeds": list(seeds),
        "cosines": _cosines_of_whole(found) if len(seeds) > 1 else [],
        "modules": [_module_row(row, _mean_gain(found, row.module)) for row in module_facts(found)],
        "layers": [_layer_row(layer, i) for i, layer in enumerate(found)],
        "spectra": {
            "path": middle.path,
            "singular_values": {la: list(u.singular_values) for la, u in zip(drawn, spectra, strict=True)},
            "effective_rank": {la: u.effective_rank for la, u in zip(drawn, spectra, strict=True)},
        },
        "distributions": _distributions(stacks, fused if merged == FUSED else {}, drawn, middle.path, layers),
    }


def _cosines_of_whole(layers: Sequence[LayerFacts]) -> list[list[float]]:
    """Return the cosines of all pairs of adapters, each taken as one vector over all layers."""
    norms = np.array([[update.norm for update in layer.updates] for layer in layers])
    products = np.array([layer.cosines for layer in layers]) * norms[:, :, None] * norms[:, None, :]
    total = np.sqrt((norms**2).sum(0))
    lengths = np.outer(total, total)
    cosines: list[list[float]] = (products.sum(0) / np.where(lengths > 0, lengths, 1)).tolist()
    return cosines


def _module_row(row: ModuleFacts, applied_gain: float | None) -> ModuleRow:
    return {
        "module": row.module,
        "layers": row.layers,
        "mean_cosine": row.mean_cosine,
        "rho": row.rho,
        "gain": row.gain,
        "sign_agreement": row.sign_agreement,
        "norm": row.norm,
        "effective_rank": row.effective_rank,
        "merged_norm": row.merged_norm,
        "merged_effective_rank": row.merged_effective_rank,
        "applied_gain": applied_gain,
    }


def _layer_row(layer: LayerFacts, position: int) -> LayerRow:
    number = re.search(r"(?:^|\.)(\d+)\.", layer.path)
    return {
        "path": layer.path,
        "module": layer.module,
        "layer": int(number[1]) if number else position,
        "mean_cosine": layer.mean_cosine,
        "applied_gain": _gain(layer),
        "effective_rank": sum(update.effective_rank for update in layer.updates) / len(layer.updates),
        "merged_effective_rank": None if layer.merged is None else layer.merged.effective_rank,
    }


def _gain(layer: LayerFacts) -> float | None:
    """Return the norm of the fused update over that of the seeds' mean update."""
    mean = layer.rho * sum(update.norm for update in layer.updates) / len(layer.updates)
    return None if layer.merged is None or not mean > 0 else layer.merged.norm / mean


def _mean_gain(layers: Sequence[LayerFacts], module: str) -> float | None:
    gains = [gain for layer in layers if layer.module == module and (gain := _gain(layer)) is not None]
    return sum(gains) / len(gains) if gains else None


def _distributions(
    stacks: Mapping[str, LoRAFactors],
    fused: Mapping[str, LoRAFactors],
    labels: Sequence[str],
    middle: str,
    layers: str,
) -> Distributions:
    """Count all entries between the same edges, in the chosen layers of the depth in the middle of them.

    What lies beyond the edges is counted in the sum alone. Without attention layers it is the one given as the middle.
    """
    rule = make_rule("soup", {} if layers == "all" else {"layers": layers, "rest": "soup"})
    chosen = [path for path in sorted(stacks, key=natural_sort_key) if rule.selects(path)]
    if not chosen and layers != LAYERS:
        raise ValueError(f"'{layers}' names none of the {len(stacks)} layers, of which one is {middle}")
    paths = [path for path in chosen if _depth(path) == _depth(chosen[len(chosen) // 2])] or [middle]
    updates = {
        path: [
            stacks[path],
            *([soup(stacks[path])] if len(stacks[path]) > 1 else []),
            *([fused[path]] if fused else []),
        ]
        for path in paths
    }
    of_layers = [[row for part in parts for row in update_facts(part)] for parts in updates.values()]
    limit = SPREADS * max(row.std for rows in of_layers for row in rows) or 1.0
    edges = torch.linspace(-limit, limit, BINS + 1, dtype=torch.float64)
    counted = []
    for part in range(len(next(iter(updates.values())))):
        first, *others = (histogram(parts[part], edges) for parts in updates.values())
        counted.append(sum(others, first))
    width, n = float(edges[1] - edges[0]), counted[0].entries
    counts = [row for each in counted for row in each.counts]
    sizes = [math.prod(stacks[path].shape) for path in updates]
    return {
        "layers": list(updates),
        "entries": n,
        "edges": edges.tolist(),
        "density": {la: [count / (n * width) for count in row] for la, row in zip(labels, counts, strict=True)},
        "std": {la: _pooled_std([rows[i] for rows in of_layers], sizes) for i, la in enumerate(labels)},
    }


def _depth(path: str) -> str:
    """Return a layer's number with what is before it, as ``model.layers.15``; the whole path if it has none."""
    found = re.match(r"(.*?\.)?\d+(?=\.)", path)
    return found[0] if found else path


def _pooled_std(updates: Sequence[UpdateFacts], sizes: Sequence[int]) -> float:
    """Return the standard deviation of the entries of several updates together."""
    mean = sum(update.mean * size for update, size in zip(updates, sizes, strict=True)) / sum(sizes)
    return math.sqrt(max(0.0, sum(update.norm**2 for update in updates) / sum(sizes) - mean**2))
