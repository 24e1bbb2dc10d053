"""A run's folder as plain data: all that its report says, and the content of ``report.json``.

Everything is computed again from what the run stored; what is drawn has a fixed seed, and no clock is read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import yaml

from seedlora.adapter import WEIGHTS_NAME, AdapterError, is_model, is_trained
from seedlora.diagnostics import LayerFacts, UpdateFacts, histogram, layer_facts, module_facts, natural, update_facts
from seedlora.evaluation import Difference, adjust_over_tasks, holm, paired_difference, wilson
from seedlora.factors import LoRAFactors
from seedlora.fuse import RECORD_NAME, base_of, hash_inputs, read_adapters, stack_adapters
from seedlora.merge import COMMON, bind, soup
from seedlora.report.advice import advice
from seedlora.report.results import (
    ALL_CONTROLS,
    BASE,
    BEST_SEED,
    FUSED,
    GREEDY,
    LOGITS,
    LONG_SEED,
    MEAN_SEED,
    MEANING,
    NO_CONTROLS,
    SELECTION_NAME,
    SOUP,
    TRAINED_NAME,
    WIDE_SEED,
    nothing_for_one_seed,
    seed_name,
)

#: Plain data, as JSON has it.
Facts: TypeAlias = dict[str, Any]

COST_NAME = "cost.json"
#: How the run's own test rows are called, beside tasks that are scored by generation.
OWN_TEST = "test set"
#: Points of a curve; longer ones are averaged over equal stretches.
POINTS = 200
#: Entries of every layer that the agreement of signs is measured on.
SAMPLES = 4096
BINS, SPREADS = 61, 4.0
#: Whose entries the distributions are made of: the paper's figure is of attention.
LAYERS = "attention"
_ANSWERED_BY_OTHERS = (
    "Tasks were scored by generation before the seeds were fused anew, and {} answered with other weights: these "
    "scores are not shown. train.py test --evaluate scores the adapters of today."
)
#: Draws of what chance does to the lead of a seed.
DEALS = 1000


def facts(run: str | Path, *, layers: str = LAYERS, on_layer: Callable[[str], object] = lambda _path: None) -> Facts:
    """Read a run's folder, finished or not.

    Costs one pass over the adapters' factors, and over the entries of one layer's updates, a block of rows at a time.

    Args:
        run: the folder.
        layers: whose entries are counted, in the middle of the model: ``attention``, ``ffn``, ``all``, or a regular
            expression that is searched for in a layer's path.
        on_layer: called with each layer's path when it is done.

    Raises:
        ValueError: if the folder holds no run, or a file in it cannot be read.
    """
    run = Path(run)
    if not (run / "run.json").is_file():
        raise ValueError(f"{run} holds no run: it has no run.json")
    settings, config = _read(run / "run.json"), _config(run)
    excluded, record, cost = (_read(run / name) for name in ("excluded.json", f"{FUSED}/{RECORD_NAME}", COST_NAME))
    ensemble = config.get("ensemble", {})
    seeds = [*map(seed_name, ensemble.get("seeds", ()))] or _seed_folders(run, excluded)
    trained = [seed for seed in seeds if is_trained(run / seed)]
    method = record.get("method") or ensemble.get("merge")
    # Plain soup is not scored a second time as the fused adapter.
    merged = SOUP if method == SOUP and not ensemble.get("merge_options") else FUSED
    stored = [run / seed for seed in trained] + ([run / FUSED] if record else [])
    answered = _read(run / "evaluation" / "settings.json").get("adapters", {})
    homes = {label: run / (FUSED if label == merged else label) for label in answered}
    homes = {label: home for label, home in homes.items() if (home / WEIGHTS_NAME).is_file()}
    digests = hash_inputs([*stored, *homes.values()])
    now = {label: digests[str(home)].result() for label, home in homes.items()}
    # Whose weights are no longer those that answered the tasks scored by generation. What was compared has no folder;
    # the fused adapter has none once it was removed.
    replaced = [
        label
        for label, known in answered.items()
        if (label in now or label == FUSED) and known.get("weights_sha256") not in (None, now.get(label))
    ]
    tests, training = _tests(run, trained, answered=not replaced), _training(run, seeds, merged)
    results = _read(run / "results.json")
    selection, name = _read(run / SELECTION_NAME), run.resolve().name
    # As the run was started, which is not where it is read from.
    started = Path(str(ensemble.get("dirpath") or name))
    found: Facts = {
        "run": name,
        "method": method,
        "merged": merged if record else None,
        "seeds": seeds,
        "trained": trained,
        "confidence_percent": 95,
        "tests": tests,
        "training": training,
        "train_sample": results.get("train_sample"),
        "selection": selection or None,
        "advice": advice(selection, _items(results), trained, method=method),
        "weights": None,
        "cost": cost.get("plan"),
        "took": cost.get("took", {}),
        "trained_on": _read(run / TRAINED_NAME),
        "shares": [],
        "missing": [],
        "left_out": [],
        "more": [],
        "reproduce": {
            "command": f"python train.py --config {started if started.name == name else name}/config.yaml "
            "--ensemble.dirpath NEW",
            "versions": cost.get("versions", {}),
            "options": {
                **record.get("options", {}),
                **{key: value for key, value in record.get("use", {}).items() if value != COMMON.get(key)},
            },
            "sha256": {},
            "base": cost.get("base", {}),
            "settings": settings,
        },
    }
    if not config:
        found["reproduce"]["command"] = None
    broken, whole = None, any(is_model(run / seed) for seed in trained)
    try:
        if trained and not whole:
            base = base_of([run / seed for seed in trained])
            stacks = stack_adapters(read_adapters([run / seed for seed in trained], base=base))
            fused = read_adapters([run / FUSED], base=base)[str(run / FUSED)].layers if record else {}
            label = merged if record else None
            found["weights"] = weight_facts(
                stacks, trained, merged=label, fused=fused, layers=layers, on_layer=on_layer
            )
        if trained:
            found["reproduce"]["sha256"] = {folder.name: digests[str(folder)].result() for folder in stored}
    except (AdapterError, OSError) as error:
        broken = " ".join(str(error).split())
    found["shares"] = _shares(found, cost)
    found["left_out"] = _left_out(found, excluded=excluded, record=record)
    found["more"] = _more(found, ensemble)
    found["missing"] = [
        *_missing(found, excluded=excluded, config=config, record=record),
        *(["Cosines, spectra and gains are of adapters; these seeds are whole models."] if whole else []),
        *([] if not replaced else [_ANSWERED_BY_OTHERS.format(", ".join(replaced))]),
        *([] if broken is None else [f"The adapters cannot be read, so nothing is said about their weights: {broken}"]),
    ]
    found["adapters"] = _adapters(found)
    pending = set(seeds) - {*trained, *excluded}
    found["verdict"] = "The run is not finished, so there is no verdict." if pending else _verdict(found)
    return found


# What a run stores


def _read(file: Path) -> dict[str, Any]:
    """A JSON file; nothing if it is not there."""
    if not file.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    return content


def _config(run: Path) -> dict[str, Any]:
    file = run / "config.yaml"
    try:
        return (yaml.safe_load(file.read_text(encoding="utf-8")) or {}) if file.is_file() else {}
    except yaml.YAMLError as error:
        raise ValueError(f"{file} cannot be read: {error}") from None


def _seed_folders(run: Path, excluded: Mapping[str, str]) -> list[str]:
    folders = {folder.name for folder in run.glob("seed_*") if is_trained(folder)}
    return sorted({*folders, *excluded}, key=natural)


# Scores


def _tests(run: Path, seeds: Sequence[str], *, answered: bool) -> list[Facts]:
    """Those with the outcome of each item: the run's own and, if ``answered``, the tasks scored by generation."""
    tasks = _read(run / "evaluation" / "results.json").get("tasks", {}) if answered else {}
    own, *others = (
        [test_facts(name, stored, seeds) for name, stored in part.items() if stored.get("items")]
        for part in ({OWN_TEST: _read(run / "results.json")}, tasks)
    )
    # Exact matches and generated answers are two protocols, so two families of tests.
    for family in (own, *others):
        adjust_over_tasks(((row["adapter"], row["against"]), row) for test in family for row in test["comparisons"])
        for test in family:
            test["tasks"] = len(family)
    return [*own, *(test for family in others for test in family)]


def test_facts(name: str, stored: Mapping[str, Any], seeds: Sequence[str]) -> Facts:
    """Scores and comparisons on one test set, from each item's outcome.

    Two adjustments of McNemar's p-values by Holm's rule: ``p_value_holm`` over tasks, for the same two adapters, which
    is added where all tasks are at hand (:func:`seedlora.evaluation.adjust_over_tasks`), and ``p_value_holm_table``
    over all tests that are listed for this test set.

    Args:
        name: of the test set.
        stored: ``items`` by label, and the ``metric``.
        seeds: labels that are single seeds.
    """
    items = _items(stored)
    seeds = [label for label in items if label in seeds]
    merged = [label for label in items if label not in seeds and label != BASE]
    fused = FUSED if FUSED in items else SOUP
    chance = stored.get("chance")
    controls = [label for label in merged if label in MEANING]
    scores = {label: float(right.mean()) for label, right in items.items()}
    references: dict[str, np.ndarray] = {}
    best = max(seeds, key=scores.__getitem__, default=None)
    if best is not None:
        references = {MEAN_SEED: np.mean([items[seed] for seed in seeds], axis=0), BEST_SEED: items[best]}
    if SOUP in items:
        references[SOUP] = items[SOUP]
    comparisons = [
        {"adapter": label, "against": against, **_difference(paired_difference(items[label], reference))}
        for label in merged
        for against, reference in {
            **references,
            **({control: items[control] for control in controls} if label == fused else {}),
        }.items()
        # With one seed its mean is the seed itself.
        if label != against and not (against == MEAN_SEED and len(seeds) == 1)
    ]
    tested = [row for row in comparisons if row["p_value"] is not None]
    for row, p_value in zip(tested, holm([row["p_value"] for row in tested]), strict=True):
        row["p_value_holm_table"] = p_value
    right_seeds = np.sum([items[seed] for seed in seeds], axis=0) if seeds else np.zeros(0)
    return {
        "name": name,
        "metric": stored.get("metric"),
        "items_sha256": stored.get("items_sha256"),
        "chance": chance,
        "n": len(next(iter(items.values()))),
        "scores": [
            {"adapter": label, "right": int(right.sum()), **asdict(wilson(right))} for label, right in items.items()
        ],
        "mean_seed": float(np.mean([scores[seed] for seed in seeds])) if seeds else None,
        "seed_spread": float(np.std([scores[seed] for seed in seeds], ddof=1)) if len(seeds) > 1 else None,
        "best_seed": best,
        "comparisons": comparisons,
        "by_right_seeds": [
            {
                "right_seeds": k,
                "items": int((right_seeds == k).sum()),
                "right": {la: int(items[la][right_seeds == k].sum()) for la in (SOUP, LOGITS, FUSED) if la in items},
            }
            for k in range(len(seeds) + 1)
            if len(seeds) > 1 and merged
        ],
        "domains": [
            row for kind, values in stored.get("domains", {}).items() for row in _domains(kind, values, items, seeds)
        ],
    }


def _domains(kind: str, values: Sequence[str], items: Mapping[str, np.ndarray], seeds: Sequence[str]) -> list[Facts]:
    """Scores within each sub-domain, and by how much its best seed leads the mean seed.

    By chance, one seed leads too: the outcomes of each item are dealt to the seeds anew, :data:`DEALS` times, and
    ``lead_by_chance`` is the mean lead then, ``p_value`` the share of deals (with the true one) that lead as far.
    """
    found, rng = [], np.random.default_rng(0)
    for value in sorted(set(values), key=natural):
        where = np.array([other == value for other in values])
        row: Facts = {
            "domain": f"{kind} {value}",
            "items": int(where.sum()),
            "scores": {label: float(right[where].mean()) for label, right in items.items()},
            "winners": _winners({label: int(right[where].sum()) for label, right in items.items()}),
            **dict.fromkeys(("best_seed", "lead", "lead_by_chance", "p_value")),
        }
        if len(seeds) > 1:
            right_IN = np.stack([items[seed][where] for seed in seeds], axis=1)
            leads = [_lead(rng.permuted(right_IN, axis=1)) for _ in range(DEALS)]
            row["best_seed"] = max(seeds, key=row["scores"].__getitem__)
            row["lead"], row["lead_by_chance"] = _lead(right_IN), float(np.mean(leads))
            row["p_value"] = (1 + sum(lead >= row["lead"] - 1e-12 for lead in leads)) / (1 + DEALS)
        found.append(row)
    return found


def _winners(right: Mapping[str, int]) -> list[str]:
    """All that get most items right; none where nobody gets any."""
    most = max(right.values())
    return [label for label, count in right.items() if count == most > 0]


def _lead(right_IN: np.ndarray) -> float:
    """Score of the best seed minus that of the mean seed."""
    scores = right_IN.mean(0)
    return float(scores.max() - scores.mean())


def _items(stored: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """By label whether each item is right; nothing if that is not stored."""
    digits = stored.get("items", {})
    return {label: np.array([digit == "1" for digit in digits[label]]) for label in digits}


def _difference(difference: Difference) -> Facts:
    return {**asdict(difference), "shown": difference.shown, "p_value_holm": None, "p_value_holm_table": None}


# Training


def _training(run: Path, seeds: Sequence[str], merged: str) -> Facts:
    """Losses by adapter: ``[step, loss]`` pairs; training losses averaged to at most :data:`POINTS` points.

    What was validated as the fused adapter has the label that it has everywhere else.
    """
    order = {seed.removeprefix("seed_"): i for i, seed in enumerate(seeds)}
    # A pass has a file of its own, named by its seeds.
    order |= {LONG_SEED: len(order), WIDE_SEED: len(order) + 1}
    files = sorted(run.glob("metrics*.jsonl"), key=lambda file: order.get(f"{file.stem}-".split("-")[1], -1))
    train: dict[str, list[list[float]]] = {}
    validation: dict[str, list[list[float]]] = {}
    for file in files:
        own_train: dict[str, list[list[float]]] = {}
        own_validation: dict[str, list[list[float]]] = {}
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # a crash left it unfinished
            for curves, prefix in ((own_train, "train/loss_"), (own_validation, "val/loss_")):
                for key, value in entry.items():
                    if key.startswith(prefix) and math.isfinite(value):
                        curves.setdefault(key.removeprefix(prefix), []).append([entry["step"] + 1, value])
        # A seed that was begun in another stack was trained anew; the last pass's fused adapter holds all seeds.
        train |= own_train
        validation |= {merged if label == FUSED else label: curve for label, curve in own_validation.items()}
    stretch = math.ceil(max((len(curve) for curve in train.values()), default=1) / POINTS)
    return {
        "steps_per_point": stretch,
        "ends": {
            label: {"step": curve[-1][0], "last": curve[-1][1], "lowest": min(loss for _, loss in curve)}
            for label, curve in validation.items()
        },
        "train": {label: _averaged(curve, stretch) for label, curve in train.items()},
        "validation": validation,
    }


def _shares(found: Facts, cost: Mapping[str, Any]) -> list[Facts]:
    """What the ensemble takes, and what one of its seeds takes alone; ``None`` where that is not known.

    Tokens are those that were seen, for one seed their mean; until all seeds are trained, those of the plan. The times
    of one seed are those of the control that is trained for the tokens of all.
    """
    if not (plan := found["cost"]):
        return []
    n, seen = len(plan["seeds"]), [found["trained_on"].get(seed, {}) for seed in found["seeds"]]
    estimates = (sum(plan.get(key, {}).values()) / 2**30 for key in ("memory", "memory_alone"))
    took, peak = found["took"].get("seeds", {}), cost.get("peak_bytes", 0) / 2**30
    alone = took if n == 1 else found["took"].get(LONG_SEED, {})
    rows: list[tuple[str, float | None, float | None]] = []
    for key, planned, what in (("tokens", "tokens", "tokens"), ("scored", "supervised", "of these scored")):
        counts = [row[key] for row in seen if key in row]
        if len(counts) == n:
            rows.append((what, sum(counts), round(sum(counts) / n)))
        else:
            rows.append((f"{what}, planned", n * plan[planned], plan[planned]))
    rows += [
        ("trainable parameters", n * plan["trainable"], plan["trainable"]),
        ("memory of training, estimated, GiB", *estimates),
        ("memory of training, its peak as measured, GiB", peak, peak if n == 1 else None),
        ("training on the tokens of all, seconds", took.get("training"), alone.get("training")),
        ("validating meanwhile, seconds", took.get("validation"), alone.get("validation")),
    ]
    return [{"what": what, "all": every, "one": one or None} for what, every, one in rows if every]


def _adapters(found: Facts) -> list[Facts]:
    """What each adapter cost, where its training loss ended, and its score on the first test set.

    ``train_loss`` is the mean over the last tenth of the training, at least one point; ``sample_loss`` that on the
    training rows that all adapters were scored on after the test. The tokens of the fused adapter are those of all
    seeds. Where it is not stored how many an adapter has seen, the plan says it, unless a seed may have been stopped.
    """
    plan, training = found["cost"], found["training"]
    seeds, n = found["trained"], len(found["trained"])
    tests = found["tests"][:1]
    scores = {row["adapter"]: row for test in tests for row in test["scores"]}
    share = {
        **dict.fromkeys(seeds, 1),
        LONG_SEED: len(plan["seeds"]) if plan else None,
        WIDE_SEED: 1,
        FUSED: n,
        SOUP: n,
    }
    seen = {label: row["tokens"] for label, row in found["trained_on"].items() if "tokens" in row}
    if all(seed in seen for seed in seeds):
        seen |= dict.fromkeys((FUSED, SOUP), sum(seen[seed] for seed in seeds))
    if plan and not found["reproduce"]["settings"].get("ensemble.patience"):
        seen = {label: plan["tokens"] * times for label, times in share.items() if times} | seen
    sample = (found["train_sample"] or {}).get("losses", {})
    rows = []
    for label in (*share, *(label for label in sample if label not in share and label != BASE)):
        curve, score = training["train"].get(label, []), scores.get(label)
        if score is None and not curve:
            continue
        last = [loss for _, loss in curve[-max(1, len(curve) // 10) :]]
        rows.append(
            {
                "adapter": label,
                "tokens": seen.get(label),
                "train_loss": sum(last) / len(last) if last else None,
                "sample_loss": sample.get(label),
                **{key: score and score[key] for key in ("value", "low", "high")},
            }
        )
    return rows


def _averaged(curve: list[list[float]], stretch: int) -> list[list[float]]:
    if stretch == 1:
        return curve
    parts = [np.array(curve[i : i + stretch]) for i in range(0, len(curve), stretch)]
    return [[float(part[-1, 0]), float(part[:, 1].mean())] for part in parts]


# Weights


def weight_facts(
    stacks: Mapping[str, LoRAFactors],
    seeds: Sequence[str],
    *,
    merged: str | None,
    fused: Mapping[str, LoRAFactors],
    layers: str = LAYERS,
    on_layer: Callable[[str], object] = lambda _path: None,
) -> Facts:
    """Cosines, spectra, distributions and gains of adapters.

    Args:
        stacks: the adapters of every layer by path.
        seeds: their labels.
        merged: the label of what was made of them, if anything was; plain soup is drawn under its own name.
        fused: that adapter.
        layers: as in :func:`facts`.
        on_layer: called with each layer's path when it is done.
    """
    paths = sorted(stacks, key=natural)
    found = []
    for path in paths:
        found.append(layer_facts(path, stacks[path], merged=fused.get(path), samples=SAMPLES))
        on_layer(path)
    middle = found[len(found) // 2]
    drawn = [*seeds, *([SOUP] if len(seeds) > 1 else []), *([FUSED] if merged == FUSED else [])]
    norms = np.array([[update.norm for update in layer.updates] for layer in found])
    products = np.array([layer.cosines for layer in found]) * norms[:, :, None] * norms[:, None, :]
    total = np.sqrt((norms**2).sum(0))
    lengths = np.outer(total, total)
    spectra = [
        *middle.updates,
        *(update_facts(soup(stacks[middle.path])) if SOUP in drawn else ()),
        *([middle.merged] if merged == FUSED and middle.merged is not None else []),
    ]
    return {
        "seeds": list(seeds),
        "cosines": (products.sum(0) / np.where(lengths > 0, lengths, 1)).tolist() if len(seeds) > 1 else [],
        "modules": [{**asdict(row), "applied_gain": _mean_gain(found, row.module)} for row in module_facts(found)],
        "layers": [_layer_row(layer, i) for i, layer in enumerate(found)],
        "spectra": {
            "path": middle.path,
            "singular_values": {la: list(u.singular_values) for la, u in zip(drawn, spectra, strict=True)},
            "effective_rank": {la: u.effective_rank for la, u in zip(drawn, spectra, strict=True)},
        },
        "distributions": _distributions(stacks, fused if merged == FUSED else {}, drawn, middle.path, layers),
    }


def _layer_row(layer: LayerFacts, position: int) -> Facts:
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
    """Norm of the fused update over that of the seeds' mean update."""
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
) -> Facts:
    """Densities of all entries between the same edges, in the chosen layers of the depth in the middle of them.

    What lies beyond the edges is counted in the sum alone. Without attention layers it is the one given as the middle.
    """
    rule = bind("soup", {} if layers == "all" else {"layers": layers, "rest": "soup"})
    chosen = [path for path in sorted(stacks, key=natural) if rule.selects(path)]
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
    """What is before the number of a layer, and the number: all of ``model.layers.15``; the path if it has none."""
    found = re.match(r"(.*?\.)?\d+(?=\.)", path)
    return found[0] if found else path


def _pooled_std(updates: Sequence[UpdateFacts], sizes: Sequence[int]) -> float:
    """Of the entries of several updates together."""
    mean = sum(update.mean * size for update, size in zip(updates, sizes, strict=True)) / sum(sizes)
    return math.sqrt(max(0.0, sum(update.norm**2 for update in updates) / sum(sizes) - mean**2))


# Words


def _left_out(found: Facts, *, excluded: Facts, record: Facts) -> list[str]:
    """What was refused, dropped, stopped or chosen away, a sentence each."""
    plan, selection = found["cost"] or {}, found["selection"] or {}
    said = [f"{seed} was left out: {reason}." for seed, reason in excluded.items()]
    said += [f"Of the rows of the data: {sentence}." for sentence in plan.get("left_out", ())]
    for label, row in found["trained_on"].items():
        if row["stopped"]:
            said.append(f"{label} was stopped after step {row['steps']:,}: its validation loss improved no more.")
        if row["kept_step"] is not None:
            said.append(f"Of {label} the weights of step {row['kept_step']:,} were kept, its best validation.")
    if names := selection.get("not_finite"):
        said.append(f"Without a finite validation loss, and so not chosen: {', '.join(names)}.")
    if (greedy := selection.get("controls", {}).get(GREEDY)) is not None:
        members = [found["trained"][i] for i in greedy["members"] if i < len(found["trained"])]
        dropped = [seed for seed in found["trained"] if seed not in members]
        if dropped:
            said.append(f"The greedy soup is of {', '.join(members)}; {', '.join(dropped)} would harm.")
    if "compression" in record:
        mean, largest = (record["compression"][f"relative_error_{key}"] for key in ("mean", "max"))
        said.append(
            "The fused adapter is compressed: relative Frobenius error "
            f"{mean:.3g} on average over the layers, {largest:.3g} at most."
        )
    return said


def _missing(found: Facts, *, excluded: Facts, config: Facts, record: Facts) -> list[str]:
    """What was never there, a sentence each."""
    said = []
    pending = [seed for seed in found["seeds"] if seed not in found["trained"] and seed not in excluded]
    if pending:
        said.append(
            f"The run is not finished: {_listed(pending)} not trained; repeat its command with --resume "
            f"--ensemble.dirpath and this folder."
        )
    if len(found["trained"]) == 1 and not pending:
        said.append("Only one seed was trained: there is no spread between seeds, and nothing to average.")
    if not record and found["trained"] and not pending:
        said.append("Nothing was fused.")
    if not found["training"]["train"]:
        said.append("No training losses are stored.")
    if not found["training"]["validation"]:
        said.append("There was no validation.")
    if not found["tests"]:
        said.append("No test set was scored, or the outcomes of its items are not stored.")
    elif found["train_sample"] is None:
        said.append(
            "No training rows were scored beside the test, so only what was trained has a training loss; "
            "train.py test --ensemble.dirpath and this folder scores them."
        )
    if found["cost"] is None:
        said.append("The plan and the versions of the libraries are not stored.")
    elif len(found["cost"]["seeds"]) > 1 and not found["took"].get(LONG_SEED):
        said.append(
            "No seed was trained alone, so what one takes is known in tokens and estimated in memory; the time is not "
            "known."
        )
    if not config:
        said.append("There is no config.yaml: the run was not started by train.py.")
    return said


def _more(found: Facts, ensemble: Mapping[str, Any]) -> list[str]:
    """The comparisons that the run does not hold, and the options that give them."""
    compare, controls = ensemble.get("compare"), ensemble.get("controls") or NO_CONTROLS
    if len(found["trained"]) == 1:
        options = {
            "--merge auto": ensemble.get("merge") == "auto",
            "--compare": compare,
            "--controls": controls != NO_CONTROLS,
        }
        said = nothing_for_one_seed(options)
        return [] if said is None else [said]
    return [
        *([] if compare else ["Other methods on the same items: --compare ties,knots_ties."]),
        *(
            []
            if controls == ALL_CONTROLS
            else ["One seed for the tokens of all, and one with the rank of all: --controls."]
        ),
        *(
            []
            if controls != NO_CONTROLS
            else [
                "Tuned gains, the greedy soup, every subset of the seeds: --controls untrained, with validation rows."
            ]
        ),
    ]


def _verdict(found: Facts) -> str:
    """The outcome on the first test set in one sentence; without one, what validation says."""
    for test in found["tests"]:
        rows = test["comparisons"]
        for label in (FUSED, SOUP):
            row = next((row for row in rows if row["adapter"] == label), None)
            if row is None:
                continue
            said = f"{_named(label, found['method'])}: {_judged(row, 'the ' + row['against'], found)}"
            soup_row = next((r for r in rows if r["adapter"] == label and r["against"] == SOUP), None)
            against = "" if soup_row is None else f"; {_judged(soup_row, SOUP, found)}"
            return f"{said}{against} (n = {test['n']})."
    name = _named(found["merged"] or FUSED, found["method"])
    selection = found["selection"] or {"against": {}}
    halves = []
    for label, row in selection["against"].items():
        if label != found["merged"]:
            judged = "no different from" if not row["shown"] else "lower than" if row["value"] < 0 else "higher than"
            interval = f"{found['confidence_percent']} % interval {row['low']:+.4f} to {row['high']:+.4f}"
            halves.append(
                f"{judged} {label}'s{'' if row['shown'] else ' as far as shown'}, {row['value']:+.4f} ({interval})"
            )
    if halves:
        own = ", on which it was chosen, which flatters it" if selection["chosen"] else ""
        return f"{name} was not tested. Its loss on the {selection['rows']} validation rows{own}: {'; '.join(halves)}."
    last = {label: curve["last"] for label, curve in found["training"]["ends"].items()}
    if FUSED in last and (seeds := [last[seed] for seed in found["trained"] if seed in last]):
        return (
            f"{name} was not tested; its validation loss is {last[FUSED]:.3f}, "
            f"that of the seeds {min(seeds):.3f} to {max(seeds):.3f}."
        )
    return "Nothing was scored against the seeds, so there is no verdict."


def _judged(row: Mapping[str, Any], other: str, found: Facts) -> str:
    """A difference on test items in words, with its interval."""
    judged = "no difference from" if not row["shown"] else "better than" if row["value"] > 0 else "worse than"
    return f"{judged} {other}{'' if row['shown'] else ' shown'}, {_points(row, found['confidence_percent'])}"


def _points(row: Mapping[str, Any], percent: int) -> str:
    interval = f"{percent} % interval {100 * row['low']:+.1f} to {100 * row['high']:+.1f}"
    return f"{100 * row['value']:+.1f} points ({interval})"


def _named(label: str, method: str | None) -> str:
    return "Soup" if label == SOUP else f"The fused adapter ({method})"


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'}"


# Several runs


def comparison(runs: Sequence[Facts], items: Sequence[Mapping[str, np.ndarray]]) -> Facts:
    """Several runs side by side; those whose first test set has the same items are compared item by item.

    Args:
        runs: facts of each.
        items: of each run's first test set, by label whether each item was right.
    """
    rows = [_run_row(run) for run in runs]
    paired: list[Facts] = []
    apart: list[str] = []
    for i, row in enumerate(rows):
        first = next((j for j in range(i) if row["items_sha256"] and rows[j]["items_sha256"] == row["items_sha256"]), i)
        labels = [runs[j]["merged"] for j in (i, first)]
        if first == i or any(label not in items[j] for label, j in zip(labels, (i, first), strict=True)):
            if i and row["n"]:
                apart.append(row["run"])
            continue
        difference = paired_difference(items[i][labels[0]], items[first][labels[1]])
        paired.append({"run": row["run"], "against": rows[first]["run"], **_difference(difference)})
    for row, p_value in zip(paired, holm([row["p_value"] for row in paired]), strict=True):
        row["p_value_holm_table"] = p_value
    return {
        "runs": rows,
        "verdict": " ".join(_compared(row, runs[0]["confidence_percent"]) for row in paired)
        or "No two of these runs were tested on the same items.",
        "paired": paired,
        "confidence_percent": runs[0]["confidence_percent"],
        "missing": [
            *(
                f"{name} was not tested on the items of a run before it, so far as is stored: its scores stand apart."
                for name in apart
            ),
            *(f"{run['run']}: {sentence}" for run in runs for sentence in run["missing"]),
        ],
    }


def _compared(row: Mapping[str, Any], percent: int) -> str:
    judged = "no difference" if not row["shown"] else "better" if row["value"] > 0 else "worse"
    return (
        f"{row['run']} against {row['against']}, fused adapters on the same {row['n']:,} items: "
        f"{judged}{'' if row['shown'] else ' shown'}, {_points(row, percent)}."
    )


def first_items(run: str | Path) -> dict[str, np.ndarray]:
    """The outcomes of a run's own test set by label; empty without them."""
    return _items(_read(Path(run) / "results.json"))


def _run_row(run: Facts) -> Facts:
    test = next((test for test in run["tests"] if test["name"] == OWN_TEST), None)
    label = run["merged"]
    score = next((row for row in test["scores"] if row["adapter"] == label), None) if test else None
    versus = (
        next((r for r in test["comparisons"] if r["adapter"] == label and r["against"] == MEAN_SEED), None)
        if test
        else None
    )
    weights = run["weights"]
    cosines = np.array(weights["cosines"] if weights else [])
    pairs = cosines[np.tril_indices(len(cosines), -1)] if len(cosines) > 1 else np.zeros(0)
    return {
        "run": run["run"],
        "method": run["method"],
        "seeds": len(run["trained"]),
        "n": test and test["n"],
        "items_sha256": test and test["items_sha256"],
        "mean_seed": test and test["mean_seed"],
        "seed_spread": test and test["seed_spread"],
        "fused": score,
        "against_mean_seed": versus,
        "mean_cosine": float(np.mean(pairs)) if len(pairs) else None,
        "verdict": run["verdict"],
    }
