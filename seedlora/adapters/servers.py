"""Give servers what they want besides a correct adapter: one shape, every targeted module in every layer, whole groups.

Shape legend: ``D`` output features, ``K`` input features, ``R`` rank.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from seedlora.adapters.adapter import quantization_of
from seedlora.adapters.config_keys import REFUSED_KEYS, base_changing_init, refused_key, unknown_key
from seedlora.adapters.key_names import wrapper_of
from seedlora.model.base_layers import base_layers
from seedlora.model.weight_files import WeightFiles, broken_weights
from seedlora.updates.factors import LoRAFactors

#: Modules that servers merge into one product, and drop or refuse unless all of them are adapted.
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
#: Modules of a group that have one shape in every architecture.
_MODULES_OF_ONE_SHAPE = ({"k_proj", "v_proj"}, {"gate_proj", "up_proj"})
#: The servers about which rules are known.
SERVERS = ("vLLM", "SGLang", "LoRAX", "TGI", "llama.cpp")
#: vLLM's --max-lora-rank takes one of these.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
#: Begins the sentence about what may stand in a server's way, and cannot be told.
NOT_KNOWN = "not known: "
_LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class CompleteLayers(NamedTuple):
    """The updates of every layer that servers want, by layer path, in the order of the paths.

    Args:
        layers: those that were adapted, and zeros for the others.
        unknown: paths that should be there too, but whose shape is not known.
    """

    layers: dict[str, LoRAFactors]
    unknown: list[str]


def add_zero_updates(
    layers: Mapping[str, LoRAFactors], shapes: Mapping[str, tuple[int, int]] | None = None
) -> CompleteLayers:
    """Add zero updates, so that every adapted module is there in every layer, and q/k/v and gate/up are together.

    Args:
        layers: one adapter per layer path, all of one rank.
        shapes: ``(D, K)`` of the base model's layers by path, as :func:`base_shapes` reads them. With it, all layers
            of the model are known; without, only those that carry some adapter, and the shapes of modules that have a
            partner of the same shape.

    Returns:
        The layers with zeros added, and the paths of which no shape is known.
    """
    if shapes is not None and not set(shapes) & set(layers):
        shapes = None  # a checkpoint that names its layers otherwise tells nothing about these
    full, unknown = dict(layers), []
    by_template: dict[str, LoRAFactors] = {}
    for path, factors in layers.items():
        by_template.setdefault(_template(path), factors)
    indices = defaultdict(set)
    for path in (*layers, *(shapes or ())):
        indices[_stem(_template(path))].add(tuple(_LAYER_NUMBER.findall(path)))
    for template in sorted(wanted for found in by_template for wanted in _group_templates(found)):
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
    return CompleteLayers(dict(sorted(full.items())), sorted(set(unknown)))


def base_shapes(
    base_model: str | Path, *, task_type: str | None = None, fan_in_fan_out: bool = False
) -> dict[str, tuple[int, int]] | None:
    """Return ``(D, K)`` of every layer of a base model that could be adapted, by layer path.

    They are those of the model's own classes. Where these are not known, every two-dimensional weight counts: headers
    are read, and the descriptions of 4-bit weights.

    Args:
        base_model: a folder, or a hub id, of which a snapshot may be on this machine.
        task_type: PEFT's, which says which class the model is loaded by.
        fan_in_fan_out: where the classes are not known, the weights are stored as ``(K, D)``.

    Returns:
        None if there is none on this machine, or it cannot be read. Nothing is downloaded.
    """
    if str(base_model) and (known := base_layers(base_model, task_type)) is not None:
        return dict(known.shapes)
    base = WeightFiles(base_model, cached=True)
    try:
        shapes = {key.removesuffix(".weight"): base.shape(key) for key in base.files if key.endswith(".weight")}
    except (SafetensorError, OSError, ValueError):
        return None
    matrices = {path: (shape[0], shape[1]) for path, shape in shapes.items() if len(shape) == 2}
    return {path: shape[::-1] if fan_in_fan_out else shape for path, shape in matrices.items()} or None


def _template(path: str) -> str:
    """Return a path with its layer numbers left open: ``model.layers.{}.mlp.up_proj``."""
    return _LAYER_NUMBER.sub("{}", path)


def _stem(template: str) -> str:
    """Return the first part of a template, which modules share that are repeated together: ``model.layers.{}``."""
    return template[: template.rfind("{}") + 2] if "{}" in template else template


def _group_templates(template: str) -> list[str]:
    """Return the templates of the group that a module belongs to; itself alone if it has none."""
    stem, dot, leaf = template.rpartition(".")
    return [stem + dot + other for group in GROUPS if leaf in group for other in group] or [template]


def _shape_of_partner(template: str, by_template: Mapping[str, LoRAFactors]) -> tuple[int, int] | None:
    stem, dot, leaf = template.rpartition(".")
    same = next((names for names in _MODULES_OF_ONE_SHAPE if leaf in names), {leaf})
    return next((by_template[t].shape for name in (leaf, *same) if (t := stem + dot + name) in by_template), None)


@dataclass(frozen=True)
class _AdapterHeader:
    """The parts of an adapter folder that servers look at: its configuration, and the shapes of its tensors."""

    config: Mapping[str, Any]
    quantization: str
    wrapped: str | None
    ranks: frozenset[int]
    keys: tuple[str, ...]
    missing: tuple[str, ...]

    def is_set(self, key: str) -> bool:
        return bool(self.config.get(key))

    def describe_start(self) -> str | None:
        """Say that training changed the base weights at its start, if it did: servers load the original ones."""
        if (name := base_changing_init(self.config)) is None:
            return None
        init = str(self.config["init_lora_weights"])[:80]
        return f"init_lora_weights {init!r}: {name} changed the base weights, and a server has the original ones"


#: What a server does with an adapter that is not of the universal shape: which servers, and the sentence if it is so.
_SERVER_RULES: tuple[tuple[tuple[str, ...], Callable[[_AdapterHeader], str | None]], ...] = (
    (SERVERS, lambda a: a.describe_start()),
    (
        SERVERS,
        lambda a: f"it belongs on its base model in {a.quantization} alone" if a.quantization != "none" else None,
    ),
    (SERVERS, lambda a: f"{key}: {REFUSED_KEYS[key]}" if (key := refused_key(a.config)) else None),
    (SERVERS, lambda a: f"{key}: what it changes is not known" if (key := unknown_key(a.config)) else None),
    (SERVERS, lambda a: f"'{a.wrapped}' has a wrapper's name in it: its layer is not found" if a.wrapped else None),
    (SERVERS, lambda a: "DoRA: its update depends on the base weights" if a.is_set("use_dora") else None),
    (SERVERS, lambda a: "bias: its base biases were trained" if a.config.get("bias", "none") != "none" else None),
    (SERVERS, lambda a: "lora_bias: a vector beside the factors" if a.is_set("lora_bias") else None),
    (SERVERS, lambda a: "modules_to_save: full weights beside the factors" if a.is_set("modules_to_save") else None),
    (SERVERS, lambda a: "use_rslora: the scaling is not lora_alpha / r" if a.is_set("use_rslora") else None),
    (SERVERS, lambda a: f"layers of ranks {_listed(a.ranks)}: one rank is needed" if len(a.ranks) > 1 else None),
    (SERVERS, lambda a: None if a.keys else "no tensor is named base_model.model.<path>.lora_A.weight"),
    (
        SERVERS,
        lambda a: None if isinstance(a.config.get("target_modules"), list) else "target_modules is no list of names",
    ),
    (
        ("vLLM", "SGLang", "llama.cpp"),
        lambda a: "alpha_pattern: ignored in silence (vLLM, SGLang: older ones)" if a.is_set("alpha_pattern") else None,
    ),
    (
        ("vLLM", "SGLang"),
        lambda a: "rank_pattern: older ones ignore it in silence" if a.is_set("rank_pattern") else None,
    ),
    (
        ("vLLM",),
        lambda a: (
            f"rank {max(a.ranks)} is over --max-lora-rank {VLLM_RANKS[-1]}"
            if a.ranks and max(a.ranks) > VLLM_RANKS[-1]
            else None
        ),
    ),
    (("SGLang",), lambda a: _describe_missing(a, grouped=True)),
    (("LoRAX", "TGI"), lambda a: _describe_missing(a, grouped=False)),
)
_WANT_ALL_LAYERS = ("SGLang", "LoRAX", "TGI")


def serving_problems(folder: str | Path, *, base: str | Path | None = None) -> dict[str, list[str]]:
    """List what each server would refuse, drop or ignore of an adapter folder; nothing where it serves the adapter
    whole.

    The rules were read in the sources of vLLM 0.32, SGLang 0.5.23, LoRAX, TGI and llama.cpp's converter; what no rule
    is known about is not told. Reads the configuration and the header of the weights.

    Args:
        folder: a PEFT adapter folder.
        base: its base model, a folder or a hub id, which tells what layers there are if it is on this machine.
            Default: the one that the adapter names.

    Returns:
        Sentences by server, in the order of :data:`SERVERS`. One that begins with :data:`NOT_KNOWN` is the only one of
        its server.

    Raises:
        ValueError: if it is no such folder, or a file is broken.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as handle:
            shapes = {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(broken_weights(folder / "adapter_model.safetensors", error)) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is no PEFT adapter folder that can be read: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'adapter_config.json'} holds no JSON object but {str(config)[:80]}")
    layers = {}
    for key, shape in shapes.items():
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_A\.weight", key)
        if found and len(shape) == 2 and len(b := shapes.get(key.replace(".lora_A.", ".lora_B."), ())) == 2:
            with torch.device("meta"):
                layers[found[1]] = LoRAFactors(torch.empty(1, *shape), torch.empty(1, b[0], shape[0]))
    base = str(base or config.get("base_model_name_or_path") or "")
    task = config.get("task_type")
    known = base_shapes(
        base,
        task_type=task if isinstance(task, str) else None,
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
    )
    full, unknown = add_zero_updates(layers, known)
    missing = tuple(sorted({*full, *unknown} - set(layers)))
    ranks = frozenset(factors.rank for factors in layers.values())
    wrapped = wrapper_of(shapes, folder / "adapter_model.safetensors")
    adapter = _AdapterHeader(config, quantization_of(folder), wrapped, ranks, tuple(layers), missing)
    told: dict[str, list[str]] = {server: [] for server in SERVERS}
    for servers, rule in _SERVER_RULES:
        if (sentence := rule(adapter)) is not None:
            for server in servers:
                told[server].append(sentence)
    if not set(known or ()) & set(layers):
        for server in _WANT_ALL_LAYERS:
            here = f"the base model '{base}' is not on this machine, or names its layers otherwise"
            why = here if base else "no base model is named"
            told[server] = told[server] or [f"{NOT_KNOWN}whether every layer is adapted: {why}"]
    return told


def vllm_rank(rank: int) -> int | None:
    """Return the ``--max-lora-rank`` that vLLM needs for an adapter of a rank; None if there is none."""
    return next((size for size in VLLM_RANKS if size >= rank), None)


def describe_serving(served: Mapping[str, Sequence[str]], rank: int) -> str:
    """Say which servers load an adapter, and why others do not."""
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


def is_unknown(reasons: Sequence[str]) -> bool:
    """Return whether the reasons say that nothing is known of a server."""
    return any(reason.startswith(NOT_KNOWN) for reason in reasons)


def _describe_missing(adapter: _AdapterHeader, *, grouped: bool) -> str | None:
    """Name the modules that a server misses: of a group that it merges, or of a type that other layers have."""
    templates = {_template(path) for path in adapter.keys}
    if grouped:
        paths = [path for path in adapter.missing if len(_group_templates(_template(path))) > 1]
        return f"{paths[0]} is missing ({len(paths)} in all): its group is dropped or refused" if paths else None
    paths = [path for path in adapter.missing if _template(path) in templates]
    return f"{paths[0]} is missing ({len(paths)} in all): its module type is dropped in every layer" if paths else None


def _listed(ranks: frozenset[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))
