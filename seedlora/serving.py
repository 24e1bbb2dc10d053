"""What servers want besides a correct adapter: every targeted module in every layer, and groups that are whole.

Shape legend: ``D`` output features, ``K`` input features, ``R`` rank.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from seedlora.base_weights import shards
from seedlora.factors import LoRAFactors

#: Modules that servers fuse into one product, and drop or refuse unless all of them are adapted.
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
#: Modules of a group that have one shape in every architecture.
_SAME_SHAPE = ({"k_proj", "v_proj"}, {"gate_proj", "up_proj"})

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def complete(
    layers: Mapping[str, LoRAFactors], shapes: Mapping[str, tuple[int, int]] | None = None
) -> tuple[dict[str, LoRAFactors], list[str]]:
    """Add zero updates, so that every adapted module is there in every layer, and q/k/v and gate/up are together.

    Args:
        layers: one adapter per layer path, all of one rank.
        shapes: ``(D, K)`` of the base model's layers by path, as :func:`base_shapes` reads them. With it, all layers
            of the model are known; without, only those that carry some adapter, and the shapes of modules that have a
            partner of the same shape.

    Returns:
        The layers with zeros added, in the order of their paths, and the paths that should be there but whose shape
        is not known.
    """
    if shapes is not None and not set(shapes) & set(layers):
        shapes = None  # a checkpoint that names its layers otherwise tells nothing about these
    full, unknown = dict(layers), []
    by_template: dict[str, LoRAFactors] = {}
    for path, factors in layers.items():
        by_template.setdefault(_template(path), factors)
    indices = defaultdict(set)
    for path in (*layers, *(shapes or ())):
        indices[_stem(_template(path))].add(tuple(_NUMBER.findall(path)))
    for template in sorted(wanted for found in by_template for wanted in _partners(found)):
        for index in sorted(indices[_stem(template)]):
            path = template
            for number in index:
                path = path.replace("{}", number, 1)
            if path in full or (shapes is not None and path not in shapes):
                continue
            like = next(iter(layers.values()))
            if shapes is not None:
                shape: tuple[int, int] | None = shapes[path]
            else:
                shape = _shape_of_partner(template, by_template)
            if shape is None:
                unknown.append(path)
                continue
            a, b = torch.zeros(1, like.rank, shape[1]), torch.zeros(1, shape[0], like.rank)
            full[path] = LoRAFactors(a.to(like.A), b.to(like.B))
    return dict(sorted(full.items())), sorted(set(unknown))


def base_shapes(base_model: str | Path, *, fan_in_fan_out: bool = False) -> dict[str, tuple[int, int]] | None:
    """``(D, K)`` of every two-dimensional weight of a model folder, by layer path; only headers are read.

    Args:
        base_model: a folder with safetensors files.
        fan_in_fan_out: the weights are stored as ``(K, D)``.

    Returns:
        None if it is no such folder, or cannot be read.
    """
    folder = Path(base_model)
    if not str(base_model) or not folder.is_dir():
        return None
    found: dict[str, tuple[int, int]] = {}
    try:
        for file in shards(folder):
            with safe_open(file, framework="pt") as handle:
                for key in handle.keys():  # noqa: SIM118 - not a dict
                    shape = tuple(handle.get_slice(key).get_shape())
                    if key.endswith(".weight") and len(shape) == 2:
                        found[key.removesuffix(".weight")] = shape[::-1] if fan_in_fan_out else shape
    except (SafetensorError, OSError, ValueError, KeyError):
        return None
    return found or None


def _template(path: str) -> str:
    """``model.layers.{}.mlp.up_proj``."""
    return _NUMBER.sub("{}", path)


def _stem(template: str) -> str:
    """What modules share that are repeated together: ``model.layers.{}``."""
    return template[: template.rfind("{}") + 2] if "{}" in template else template


def _partners(template: str) -> list[str]:
    """The templates of the group that a module belongs to; itself alone if it has none."""
    stem, dot, leaf = template.rpartition(".")
    return [stem + dot + other for group in GROUPS if leaf in group for other in group] or [template]


def _shape_of_partner(template: str, by_template: Mapping[str, LoRAFactors]) -> tuple[int, int] | None:
    stem, dot, leaf = template.rpartition(".")
    same = next((names for names in _SAME_SHAPE if leaf in names), {leaf})
    return next((by_template[t].shape for name in (leaf, *same) if (t := stem + dot + name) in by_template), None)
