"""Train and score one cell: every way to spend its budget, on the same test items."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study.design import COUNTS, EMA_PART, TASKS, WAYS, Cell
from benchmarks.study.training import Run, Setting, model_and_data, stack_of, steps_of, train
from seedlora.merge.layers import merge_stacks
from seedlora.merge.registry import make_rule
from seedlora.names import LONG_SEED, LONG_SEED_BEST, WIDE_BATCHES, ema_name
from seedlora.report.stored import read_run
from seedlora.report.train_or_fuse import train_or_fuse_record
from seedlora.report.training_curves import training_curves
from seedlora.scores.intervals import paired_difference
from seedlora.scores.row_scores import RowScores
from seedlora.selection.candidates import gain_family, scaled_soups
from seedlora.selection.choice import Score, choose, score_lazily
from seedlora.training.module import SeedLoRAModule
from seedlora.updates.diagnostics import model_cosines
from seedlora.updates.stacks import Layers, select_adapters

#: Adapters in one forward.
AT_ONCE = 8
MEAN_SEED, SOUP, WIDE = "mean seed", "soup", "wide batch"
LONG, LONG_BEST, LONG_EMA = "long seed", "long seed, best", "long seed, mean"
#: What the others are compared with.
REFERENCES = (MEAN_SEED, SOUP, LONG_BEST, WIDE)
RULES = ("seedlora", "knots_ties", "ties")
METRICS = ("loss", "match")
Adapters = dict[str, Callable[[], Layers]]


@dataclass
class Entries:
    """Hold what a cell scores.

    Args:
        adapters: by label.
        seeds: labels whose scores are shown as their mean alone.
        on_validation: labels that are there to be chosen among, by the label of what is chosen.
    """

    adapters: Adapters = field(default_factory=dict)
    seeds: list[str] = field(default_factory=list)
    on_validation: dict[str, list[str]] = field(default_factory=dict)


def run_cell(cell: Cell, setting: Setting, floor: Mapping[str, Any]) -> dict[str, Any]:
    """Train what is left of a cell, score it, and return its line."""
    began = time.monotonic()
    epochs = max(1, round(floor["epochs"] * cell.length))
    runs = _counts(cell, epochs, floor["rate"]) if cell.kind == "counts" else _ways(cell, epochs, floor["rate"])
    for run in runs.values():
        train(setting, run)
    trained = time.monotonic()
    first = next(iter(runs.values()))
    module, data = model_and_data(setting, first)
    module.setup("validate")
    score_on: dict[str, Score] = {
        split: partial(_score, module, getattr(data, f"{split}_dataloader")) for split in ("val", "test")
    }
    entries = _entries_of_counts(setting, runs) if cell.kind == "counts" else _entries_of_ways(setting, runs)
    val = score_lazily(entries.adapters, score_on["val"], at_once=AT_ONCE)
    chosen = {label: choose({name: val[name] for name in names}) for label, names in entries.on_validation.items()}
    tried = {name for names in entries.on_validation.values() for name in names} - {SOUP}
    made = {label: make for label, make in entries.adapters.items() if label not in tried or label in chosen.values()}
    test = score_lazily(made, score_on["test"], at_once=AT_ONCE)
    for scores in (val, test):
        scores |= {label: scores[name] for label, name in chosen.items()}
    stacks = stack_of(setting.work / first.name, [f"seed_{seed}" for seed in cell.seeds])
    line = {
        "cell": asdict(cell),
        "epochs": epochs,
        "rate": floor["rate"],
        "steps": steps_of(first.task, epochs),
        "n": {split: len(rows) for split, rows in data.rows.items()},
        "tokens": int(data.rows["train"].lengths.sum()) * epochs,
        "seconds": {"train": round(trained - began), "score": round(time.monotonic() - trained)},
        "cosine": _cosine(stacks),
        "chosen": chosen,
        "sentence": None if cell.kind == "counts" else _sentence(setting.work / first.name),
    }
    for split, scores in (("val", val), ("test", test)):
        line[split] = _outcomes(scores, entries.seeds)
    return line


def _score(module: SeedLoRAModule, rows: Callable[[], Any], adapters: Mapping[str, Layers]) -> dict[str, RowScores]:
    return module.scorer.score_rows(adapters, rows())


def _cosine(stacks: Layers) -> float:
    matrix = model_cosines(stacks).numpy()
    return round(float(matrix[np.triu_indices(len(matrix), 1)].mean()), 4)


# The runs


def _ways(cell: Cell, epochs: int, rate: float) -> dict[str, Run]:
    """Return the run of each way by its label."""
    task, found = TASKS[cell.task], {}
    for label, way in WAYS.items():
        if cell.kind == "controls" and "controls" not in way.options:
            continue
        steps = steps_of(task, epochs)
        options = dict(way.options)
        if way.ema:
            options["ema"] = 1 - 1 / max(2.0, EMA_PART * steps)
        if options.get("scheme") == "local":
            options["average_every"] = max(1, steps // 10)
        if way.rates:
            options["sweep"] = {"learning_rate": [rate * factor for factor in way.rates]}
        alone = way.seeds == "first"
        seeds = cell.seeds[:1] if alone else cell.seeds
        length = len(cell.seeds) * epochs if alone else epochs
        folder = f"{cell.name}/{label.replace(' ', '_').replace(',', '')}"
        found[label] = Run(folder, task, seeds, length, rate, options, way.validates)
    return found


def _counts(cell: Cell, epochs: int, rate: float) -> dict[str, Run]:
    """Return the run of all seeds, and that of the first seed alone for the tokens of each number of seeds."""
    task = TASKS[cell.task]
    found = {"all": Run(f"{cell.name}/all", task, cell.seeds, epochs, rate, validates=False)}
    for n in COUNTS:
        options = {"keep": "best"}
        found[f"long {n}"] = Run(f"{cell.name}/long_{n}", task, cell.seeds[:1], n * epochs, rate, options)
        options = {"scheme": "branch", "trunk": 1.0}
        found[f"wide {n}"] = Run(f"{cell.name}/wide_{n}", task, cell.seeds[:n], epochs, rate * n**0.5, options, False)
    return found


# What is scored


def _entries_of_ways(setting: Setting, runs: Mapping[str, Run]) -> Entries:
    """Return the adapters of all ways: merged by soup, and for independent seeds by the other rules too."""
    entries = Entries()
    for label, run in runs.items():
        folder = setting.work / run.name
        names = _replicas(setting, run)
        stacks = stack_of(folder, names)
        if label == "independent":
            _add_independent(entries, stacks, names, folder)
        elif len(names) == 1:
            entries.adapters[label] = partial(select_adapters, stacks, [0])
        else:
            entries.adapters[label] = partial(merge_stacks, stacks, make_rule("soup"))
        if label == "rates":
            tried = {f"rates, {name}": partial(select_adapters, stacks, [i]) for i, name in enumerate(names)}
            entries.adapters |= tried
            entries.on_validation["best rate"] = list(tried)
    return entries


def _add_independent(entries: Entries, stacks: Layers, names: list[str], folder: Path) -> None:
    """Add the seeds, what they merge to, their means, and the controls."""
    made, on_validation = entries.adapters, entries.on_validation
    for i, name in enumerate(names):
        made[name] = partial(select_adapters, stacks, [i])
    entries.seeds += names
    made[SOUP] = partial(merge_stacks, stacks, make_rule("soup"))
    for rule in RULES:
        made[rule] = partial(merge_stacks, stacks, make_rule(rule))
    gains = {name: rule for name, rule in gain_family(list(stacks)).items() if rule.common.layers == "all"}
    for label, rules in {"gain p": gains, "soup x scale": scaled_soups(len(names))}.items():
        tried = {name: partial(merge_stacks, stacks, rule) for name, rule in rules.items() if name not in made}
        made |= tried
        on_validation[label] = [SOUP, *tried]
    means = stack_of(folder, [ema_name(name) for name in names])
    made["soup of means"] = partial(merge_stacks, means, make_rule("soup"))
    controls = {LONG: LONG_SEED, LONG_BEST: LONG_SEED_BEST, LONG_EMA: ema_name(LONG_SEED)}
    controls |= {name: name for name in WIDE_BATCHES if (folder / name).is_dir()}
    for label, name in controls.items():
        made[label] = partial(select_adapters, stack_of(folder, [name]), [0])
    on_validation[WIDE] = [name for name in WIDE_BATCHES if name in made]


def _entries_of_counts(setting: Setting, runs: Mapping[str, Run]) -> Entries:
    """Return soup and the paper's rule of two to eight seeds, and the long and the wide seed of each number."""
    entries = Entries()
    names = _replicas(setting, runs["all"])
    stacks = stack_of(setting.work / runs["all"].name, names)
    for i, name in enumerate(names):
        entries.adapters[name] = partial(select_adapters, stacks, [i])
    entries.seeds += names
    for n in COUNTS:
        some = partial(select_adapters, stacks, range(n))
        for rule in (SOUP, "seedlora"):
            entries.adapters[f"{rule} of {n}"] = lambda some=some, rule=rule: merge_stacks(some(), make_rule(rule))
        for label in (f"long {n}", f"wide {n}"):
            run = runs[label]
            own = stack_of(setting.work / run.name, _replicas(setting, run)[:1])
            entries.adapters[label] = partial(select_adapters, own, [0])
    return entries


def _replicas(setting: Setting, run: Run) -> list[str]:
    """Return the names of a finished run's replicas, which its folder has."""
    return list(train(setting, run).trained)


# What is written down


def _outcomes(scores: Mapping[str, RowScores], seeds: list[str]) -> dict[str, Any]:
    """Return loss and match of each adapter, and its differences from the references with intervals over items."""
    found = {label: (_per_token(s), s.correct.numpy().astype(float)) for label, s in scores.items()}
    found[MEAN_SEED] = tuple(np.mean([found[seed][metric] for seed in seeds], axis=0) for metric in (0, 1))
    return {
        label: {
            **{metric: round(float(values.mean()), 5) for metric, values in zip(METRICS, columns, strict=True)},
            "vs": {
                reference: {
                    metric: _difference(*pair) for metric, *pair in zip(METRICS, columns, found[reference], strict=True)
                }
                for reference in REFERENCES
                if reference in found and label not in (reference, *seeds)
            },
        }
        for label, columns in found.items()
    }


def _per_token(scores: RowScores) -> np.ndarray:
    """Return the loss of each row over the mean tokens of a row: its mean is the loss per token."""
    return (scores.losses.double() / scores.tokens.double().mean()).numpy()


def _difference(a: np.ndarray, b: np.ndarray) -> list[float]:
    found = paired_difference(a, b)
    return [round(float(part), 5) for part in (found.value, found.low, found.high)]


def _sentence(folder: Path) -> dict[str, Any] | None:
    """Return what the product says of a run: train longer, or fuse?"""
    run = read_run(folder)
    found = train_or_fuse_record(run, training_curves(folder, run.seeds, run.merged_label))
    return None if found is None else {key: value for key, value in found.items() if key != "sentences"}
