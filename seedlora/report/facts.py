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

from seedlora.adapter import AdapterError, adapter_sha256, is_model, is_trained
from seedlora.diagnostics import LayerFacts, layer_facts, module_facts, natural, sampled_entries
from seedlora.evaluation import Difference, holm, paired_difference, wilson
from seedlora.factors import LoRAFactors
from seedlora.fuse import RECORD_NAME, base_of, hash_inputs, read_adapters, stack_adapters
from seedlora.report.advice import advice
from seedlora.report.results import (
    BASE,
    FUSED,
    LOGITS,
    LONG_SEED,
    MEAN_SEED,
    MEANING,
    SELECTION_NAME,
    SOUP,
    WIDE_SEED,
)

#: Plain data, as JSON has it.
Facts: TypeAlias = dict[str, Any]

BEST_SEED, COST_NAME = "best seed", "cost.json"
#: Points of a curve; longer ones are averaged over equal stretches.
POINTS = 200
#: Entries of every layer that the distributions are made of.
SAMPLES = 4096
BINS, SPREADS = 61, 4.0
_ANSWERED_BY_OTHERS = (
    "Tasks were scored by generation before the seeds were fused anew, and {} answered with other weights: these "
    "scores are not shown. train.py test --evaluate scores the adapters of today."
)
#: What of the plan a seed has, and the ensemble as often as it has seeds.
_COUNTED = {"tokens": "tokens", "supervised": "of these scored", "trainable": "trainable parameters"}
#: Draws of what chance does to the lead of a seed.
DEALS = 1000


def facts(run: str | Path, *, on_layer: Callable[[str], object] = lambda _path: None) -> Facts:
    """Read a run's folder, finished or not.

    Costs one pass over the adapters' factors, no ``(D, K)`` matrix.

    Args:
        run: the folder.
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
    seeds = [f"seed_{seed}" for seed in ensemble.get("seeds", ())] or _seed_folders(run, excluded)
    trained = [seed for seed in seeds if is_trained(run / seed)]
    method = record.get("method") or ensemble.get("merge")
    # Plain soup is not scored a second time as the fused adapter.
    merged = SOUP if method == SOUP and not ensemble.get("merge_options") else FUSED
    replaced = _replaced(run, merged)
    tests, training = _tests(run, trained, answered=not replaced), _training(run, seeds)
    selection = _read(run / SELECTION_NAME)
    found: Facts = {
        "run": run.resolve().name,
        "method": method,
        "merged": merged if record else None,
        "seeds": seeds,
        "trained": trained,
        "confidence_percent": 95,
        "tests": tests,
        "training": training,
        "selection": selection or None,
        "advice": advice(selection, _items(_read(run / "results.json")), trained, method=method),
        "weights": None,
        "cost": cost.get("plan"),
        "seconds": cost.get("seconds"),
        "control_seconds": cost.get("controls", {}),
        "shares": _shares(cost),
        "missing": [],
        "reproduce": {
            "command": f"python train.py --config {run.resolve().name}/config.yaml --ensemble.dirpath NEW",
            "versions": cost.get("versions", {}),
            "options": record.get("options", {}),
            "sha256": {},
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
            found["weights"] = weight_facts(stacks, trained, merged=label, fused=fused, on_layer=on_layer)
        if trained:
            folders = [run / seed for seed in trained] + ([run / FUSED] if record else [])
            digests = hash_inputs(folders)
            found["reproduce"]["sha256"] = {Path(name).name: digest.result() for name, digest in digests.items()}
    except (AdapterError, OSError) as error:
        broken = " ".join(str(error).split())
    found["missing"] = [
        *_left_out(found, excluded=excluded, config=config, record=record),
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


def _replaced(run: Path, merged: str | None) -> list[str]:
    """The adapters whose weights are no longer those that answered the tasks scored by generation."""
    known = _read(run / "evaluation" / "settings.json").get("adapters", {})
    now = {label: adapter_sha256(run / (FUSED if label == merged else label)) for label in known}
    # What was compared has no folder; the fused adapter has none once it was removed.
    there = [label for label in known if now[label] or label == FUSED]
    return [label for label in there if known[label].get("weights_sha256") not in (None, now[label])]


def _tests(run: Path, seeds: Sequence[str], *, answered: bool) -> list[Facts]:
    """Those with the outcome of each item: the run's own and, if ``answered``, the tasks scored by generation."""
    tasks = _read(run / "evaluation" / "results.json").get("tasks", {}) if answered else {}
    found = {"test set": _read(run / "results.json"), **tasks}
    return [test_facts(name, stored, seeds) for name, stored in found.items() if stored.get("items")]


def test_facts(name: str, stored: Mapping[str, Any], seeds: Sequence[str]) -> Facts:
    """Scores and comparisons on one test set, from each item's outcome.

    Holm's rule adjusts for all McNemar tests that are listed for this test set.

    Args:
        name: of the test set.
        stored: ``items`` by label, and the ``metric``.
        seeds: labels that are single seeds.
    """
    items = _items(stored)
    seeds = [label for label in items if label in seeds]
    merged = [label for label in items if label not in seeds and label != BASE]
    fused = FUSED if FUSED in items else SOUP
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
        row["p_value_holm"] = p_value
    right_seeds = np.sum([items[seed] for seed in seeds], axis=0) if seeds else np.zeros(0)
    return {
        "name": name,
        "metric": stored.get("metric"),
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


def _lead(right_IN: np.ndarray) -> float:
    """Score of the best seed minus that of the mean seed."""
    scores = right_IN.mean(0)
    return float(scores.max() - scores.mean())


def _items(stored: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """By label whether each item is right; nothing if that is not stored."""
    digits = stored.get("items", {})
    return {label: np.array([digit == "1" for digit in digits[label]]) for label in digits}


def _difference(difference: Difference) -> Facts:
    return {**asdict(difference), "shown": difference.shown, "p_value_holm": None}


# Training


def _training(run: Path, seeds: Sequence[str]) -> Facts:
    """Losses by adapter: ``[step, loss]`` pairs; training losses averaged to at most :data:`POINTS` points."""
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
        validation |= own_validation
    stretch = math.ceil(max((len(curve) for curve in train.values()), default=1) / POINTS)
    return {
        "steps_per_point": stretch,
        "train": {label: _averaged(curve, stretch) for label, curve in train.items()},
        "validation": validation,
    }


def _shares(cost: Mapping[str, Any]) -> list[Facts]:
    """What the ensemble takes, and what one of its seeds takes alone; ``None`` where that is not known.

    The time of one seed is that of the control that is trained for the tokens of all.
    """
    if not (plan := cost.get("plan")):
        return []
    n = len(plan["seeds"])
    estimates = (sum(plan.get(key, {}).values()) / 2**30 for key in ("memory", "memory_alone"))
    rows = [
        *((what, n * plan[key], plan[key]) for key, what in _COUNTED.items()),
        ("memory of training, estimated, GiB", *estimates),
        ("memory of training, its peak as measured, GiB", cost.get("peak_bytes", 0) / 2**30, 0),
        ("training on the tokens of all, seconds", cost.get("seconds"), cost.get("controls", {}).get(LONG_SEED)),
    ]
    return [{"what": what, "all": every or None, "one": one or None} for what, every, one in rows if every]


def _adapters(found: Facts) -> list[Facts]:
    """What each trained adapter cost, where its training loss ended, and its score on the first test set.

    The loss is the mean over the last tenth of the training, at least one point. The tokens of the fused adapter are
    those of all seeds.
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
    rows = []
    for label, times in share.items():
        curve, score = training["train"].get(label, []), scores.get(label)
        if score is None and not curve:
            continue
        last = [loss for _, loss in curve[-max(1, len(curve) // 10) :]]
        rows.append(
            {
                "adapter": label,
                "tokens": plan["tokens"] * times if plan and times else None,
                "train_loss": sum(last) / len(last) if last else None,
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
    on_layer: Callable[[str], object] = lambda _path: None,
) -> Facts:
    """Cosines, spectra, distributions and gains of adapters.

    Args:
        stacks: the adapters of every layer by path.
        seeds: their labels.
        merged: the label of what was made of them, if anything was; plain soup is drawn under its own name.
        fused: that adapter.
        on_layer: called with each layer's path when it is done.
    """
    paths = sorted(stacks, key=natural)
    layers, entries = [], []
    for i, path in enumerate(paths):
        layers.append(layer_facts(path, stacks[path], merged=fused.get(path), samples=SAMPLES))
        entries.append(_entries(stacks[path], fused.get(path) if merged == FUSED else None, seed=i))
        on_layer(path)
    middle = layers[len(layers) // 2]
    labels = [*seeds, *([] if merged is None else [merged])]
    norms = np.array([[update.norm for update in layer.updates] for layer in layers])
    products = np.array([layer.cosines for layer in layers]) * norms[:, :, None] * norms[:, None, :]
    total = np.sqrt((norms**2).sum(0))
    lengths = np.outer(total, total)
    spectra = [update for update in (*middle.updates, middle.merged) if update is not None]
    drawn = [*seeds, *([SOUP] if len(seeds) > 1 else []), *([FUSED] if merged == FUSED else [])]
    return {
        "cosines": (products.sum(0) / np.where(lengths > 0, lengths, 1)).tolist() if len(seeds) > 1 else [],
        "modules": [{**asdict(row), "applied_gain": _mean_gain(layers, row.module)} for row in module_facts(layers)],
        "layers": [_layer_row(layer, i) for i, layer in enumerate(layers)],
        "spectra": {
            "path": middle.path,
            "singular_values": {la: list(u.singular_values) for la, u in zip(labels, spectra, strict=True)},
            "effective_rank": {la: u.effective_rank for la, u in zip(labels, spectra, strict=True)},
        },
        "distributions": _distributions(torch.cat(entries, 1).numpy(), drawn),
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


def _entries(stack: LoRAFactors, merged: LoRAFactors | None, *, seed: int) -> torch.Tensor:
    """Entries at the same places of each seed's update, their average if there are several, and the fused one."""
    draw = lambda factors: sampled_entries(  # noqa: E731
        factors, samples=SAMPLES, generator=torch.Generator().manual_seed(seed)
    )
    seeds_NS = draw(stack)
    parts = [seeds_NS]
    if len(stack) > 1:
        parts.append(seeds_NS.mean(0, keepdim=True))
    if merged is not None:
        parts.append(draw(merged))
    return torch.cat(parts).float()


def _distributions(entries: np.ndarray, labels: Sequence[str]) -> Facts:
    """Densities of sampled entries between the same edges for all; what lies beyond them is only counted in the sum."""
    limit = SPREADS * float(entries.std(axis=1).max()) or 1.0
    edges = np.linspace(-limit, limit, BINS + 1)
    counts = [np.histogram(row, edges)[0] for row in entries]
    width, n = float(edges[1] - edges[0]), entries.shape[1]
    return {
        "samples": n,
        "edges": edges.tolist(),
        "density": {label: (row / (n * width)).tolist() for label, row in zip(labels, counts, strict=True)},
        "std": {label: float(row.std()) for label, row in zip(labels, entries, strict=True)},
    }


# Words


def _left_out(found: Facts, *, excluded: Facts, config: Facts, record: Facts) -> list[str]:
    """What was refused, dropped or never there, a sentence each."""
    said = []
    pending = [seed for seed in found["seeds"] if seed not in found["trained"] and seed not in excluded]
    if pending:
        said.append(
            f"The run is not finished: {_listed(pending)} not trained; repeat its command with --resume "
            f"--ensemble.dirpath and this folder."
        )
    said += [f"{seed} was left out: {reason}." for seed, reason in excluded.items()]
    if len(found["trained"]) == 1 and not pending:
        said.append("Only one seed was trained: there is no spread between seeds, and nothing to average.")
    if not record and found["trained"] and not pending:
        said.append("Nothing was fused.")
    if "compression" in record:
        mean, largest = (record["compression"][f"relative_error_{key}"] for key in ("mean", "max"))
        said.append(
            "The fused adapter is compressed: relative Frobenius error "
            f"{mean:.3g} on average over the layers, {largest:.3g} at most."
        )
    if not found["training"]["train"]:
        said.append("No training losses are stored.")
    if not found["training"]["validation"]:
        said.append("There was no validation.")
    if not found["tests"]:
        said.append("No test set was scored, or the outcomes of its items are not stored.")
    if found["cost"] is None:
        said.append("The plan and the versions of the libraries are not stored.")
    if not config:
        said.append("There is no config.yaml: the run was not started by train.py.")
    return said


def _verdict(found: Facts) -> str:
    """The outcome on the first test set in one sentence; without one, what the validation losses say."""
    percent = found["confidence_percent"]
    for test in found["tests"]:
        rows = test["comparisons"]
        for label in (FUSED, SOUP):
            row = next((row for row in rows if row["adapter"] == label), None)
            if row is None:
                continue
            interval = f"{percent} % interval {100 * row['low']:+.1f} to {100 * row['high']:+.1f}"
            size = f"{100 * row['value']:+.1f} points ({interval}, n = {test['n']})"
            judged = "no difference from" if not row["shown"] else "better than" if row["value"] > 0 else "worse than"
            first = f"{_named(label, found['method'])}: {judged} the {row['against']}{'' if row['shown'] else ' shown'}"
            soup = next((r for r in rows if r["adapter"] == label and r["against"] == SOUP), None)
            if soup is None:
                return f"{first}, {size}."
            against = (
                "no difference from" if not soup["shown"] else "better than" if soup["value"] > 0 else "worse than"
            )
            return f"{first}, {size}; {against} soup{'' if soup['shown'] else ' shown'}, {100 * soup['value']:+.1f}."
    last = {label: curve[-1][1] for label, curve in found["training"]["validation"].items() if curve}
    if FUSED in last and (seeds := [last[seed] for seed in found["trained"] if seed in last]):
        return (
            f"{_named(FUSED, found['method'])} was not tested; its validation loss is {last[FUSED]:.3f}, "
            f"that of the seeds {min(seeds):.3f} to {max(seeds):.3f}."
        )
    return "Nothing was scored against the seeds, so there is no verdict."


def _named(label: str, method: str | None) -> str:
    return "Soup" if label == SOUP else f"The fused adapter ({method})"


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'}"


# Several runs


def comparison(runs: Sequence[Facts]) -> Facts:
    """Several runs side by side; their scores are comparable where their test sets are the same."""
    return {
        "runs": [_run_row(run) for run in runs],
        "confidence_percent": runs[0]["confidence_percent"],
        "missing": [f"{run['run']}: {sentence}" for run in runs for sentence in run["missing"]],
    }


def _run_row(run: Facts) -> Facts:
    test = run["tests"][0] if run["tests"] else None
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
        "mean_seed": test and test["mean_seed"],
        "seed_spread": test and test["seed_spread"],
        "fused": score,
        "against_mean_seed": versus,
        "mean_cosine": float(np.mean(pairs)) if len(pairs) else None,
        "verdict": run["verdict"],
    }
