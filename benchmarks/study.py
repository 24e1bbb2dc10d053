"""When is a fused adapter better than a seed, and which rule fuses best? SmolLM2-135M on three generated tasks.

    python benchmarks/study.py --plan            # the cells, what is done, and the time that the others take
    python benchmarks/study.py --minutes 60      # go on for an hour; killed anywhere, the next call goes on from there
    python benchmarks/study.py --summary         # tables and figures of all cells done

A cell is one stack of seeds on one task with one learning rate, trained and then scored with every way to fuse it; or,
as task ``joint``, one adapter of each task, fused across tasks. A cell done is one line of ``study/cells.jsonl`` and is
not done again; the adapters stay under ``--work`` (30 MB a cell).

- Gains, scales and p are chosen by the loss on the validation split. The test split is scored once, after that.
- Loss: nats per supervised token, end token included. Match: greedy decoding gives the answer exactly, which needs no
  generation (see ``SeedLoRAModule.score``). Both on every test item, paired item by item.
- Of each cell the differences from the mean seed and from soup are kept, with a bootstrap interval over items. Over
  cells, intervals are Student's t over clusters: all cells of one task and one set of seeds are one cluster.
- Budget: 1 epoch per seed is what one seed for 3 epochs costs (equal budget); 3 epochs per seed is the full budget.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from callbacks import EnsembleProgressBar, SeedEnsembleCallback
from datamodules import ReasoningGym
from seedlora.adapter import read_adapter
from seedlora.atomic import write_text
from seedlora.base_model import EMBEDDED
from seedlora.diagnostics import model_cosines
from seedlora.evaluation.statistics import paired_difference
from seedlora.factors import LoRAFactors
from seedlora.fuse import fuse, stack_adapters
from seedlora.merge import bind, gram, shrinkage
from seedlora.module import IGNORED, SeedLoRAModule
from seedlora.selection import (
    Layers,
    RowScores,
    Score,
    choose,
    gain_family,
    members,
    scaled_soups,
    score_lazily,
    seed_times_gain,
    subsets,
)

HERE = Path(__file__).parent
RESULTS, WORK = HERE / "study" / "cells.jsonl", Path("runs/study")

#: Options of the data module; about as many tokens each. The last two have longer questions.
TASKS: Mapping[str, Mapping[str, Any]] = {
    "chain_sum": {"num_train": 480, "num_val": 48, "num_test": 192},
    "leg_counting": {
        "task_options": {"max_animals": 4, "max_instances": 9},
        "num_train": 240,
        "num_val": 40,
        "num_test": 96,
    },
    "gsm_symbolic": {"num_train": 160, "num_val": 32, "num_test": 80},
}
JOINT = "joint"
RATES = (2e-3, 5e-4)
TRIPLES = ((11, 42, 202), (7, 19, 83), (101, 303, 505))
FIVE = (1, 2, 3, 4, 5)
EQUAL, FULL = 1, 3  # epochs of each seed
BATCH = 8

SCALES = (0.8, 1.25, 1.6)
POWERS = (0.25, 0.5, 0.75)
JOINT_SCALES = (1.0, 1.7, 2.5)
#: Rules that take all they need from the adapters.
RULES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "soup": ("soup", {}),
    "seedlora": ("seedlora", {}),
    "ties": ("ties", {}),
    "dare": ("dare_linear", {}),
    "knots_ties": ("knots_ties", {}),
    "two-stage": ("seedlora_subspace", {}),
    "seedlora, attention": ("seedlora", {"layers": "attention", "rest": "soup"}),
    "seedlora, ffn": ("seedlora", {"layers": "ffn", "rest": "soup"}),
}
JOINT_RULES = ("soup", "seedlora", "ties", "dare_ties", "knots_ties", "knots_dare_ties", "core_ties", "tsv_m", "iso_c")
MEAN_SEED, SOUP, BASE = "mean seed", "soup", "base"
METRICS = ("loss", "match")
AT_ONCE = 6  # adapters in one forward
Line = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One point of the design.

    Args:
        task: of :data:`TASKS`, or ``joint`` for the first seed's adapters of all of them.
        rate: learning rate.
        seeds: of the stack.
        epochs: of each seed.
        vary: what a seed decides.
    """

    task: str
    rate: float
    seeds: tuple[int, ...]
    epochs: int
    vary: str = "both"

    @property
    def name(self) -> str:
        """For people and folders."""
        seeds = "-".join(map(str, self.seeds))
        return f"{self.task}_lr{self.rate:g}_{self.epochs}ep_{seeds}" + ("" if self.vary == "both" else f"_{self.vary}")


def design(tasks: Sequence[str] = tuple(TASKS)) -> list[Cell]:
    """All cells, those that answer the main question first."""

    def stacks(triples: Sequence[tuple[int, ...]], epochs: int) -> list[Cell]:
        return [Cell(task, rate, seeds, epochs) for seeds in triples for rate in RATES for task in tasks]

    def across(triples: Sequence[tuple[int, ...]]) -> list[Cell]:
        return [Cell(JOINT, RATES[0], seeds, EQUAL) for seeds in triples]

    first, others = TRIPLES[:1], TRIPLES[1:]
    return [
        *stacks(first, EQUAL),
        *across(first),
        *stacks(first, FULL),
        *stacks(others, EQUAL),
        *across(others),
        *(Cell(task, RATES[0], FIVE, EQUAL) for task in tasks),
        *(Cell(task, RATES[0], first[0], EQUAL, vary) for vary in ("init", "order") for task in tasks),
        *stacks(others, FULL),
    ]


# Training and scoring one cell


@dataclass(frozen=True)
class Setting:
    """What all cells share: the base model, the data, and where adapters are kept."""

    work: Path
    base_model: str = EMBEDDED
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: TASKS)
    console: Console = field(default_factory=Console)

    def module(self, cell: Cell) -> SeedLoRAModule:
        """The model of a cell."""
        return SeedLoRAModule(self.base_model, learning_rate=cell.rate)

    def data(self, task: str, module: SeedLoRAModule) -> ReasoningGym:
        """The rows of a task, tokenised."""
        data = ReasoningGym(task=task, batch_size=BATCH, **self.tasks[task])
        data.tokenizer = module.tokenizer
        data.setup()
        return data


def train(cell: Cell, setting: Setting, module: SeedLoRAModule, data: ReasoningGym) -> SeedEnsembleCallback:
    """Train the seeds of a cell that have no adapter yet, from the last checkpoint if there is one."""
    ensemble = SeedEnsembleCallback(
        cell.seeds, merge="none", dirpath=setting.work / cell.name, budget="full", vary=cell.vary, resume=True
    )
    if ensemble.pending:
        trainer = pl.Trainer(
            max_epochs=cell.epochs,
            accelerator="auto",
            devices=1,
            gradient_clip_val=1.0,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=setting.console.is_terminal,
            use_distributed_sampler=False,
            callbacks=[ensemble, *([EnsembleProgressBar()] if setting.console.is_terminal else [])],
        )
        trainer.fit(module, datamodule=data, ckpt_path=ensemble.ckpt_path)
    else:
        module.setup("validate")
    return ensemble


def scorer(module: SeedLoRAModule, data: ReasoningGym, split: str) -> Score:
    """Scores adapters on the rows of a split, all that it is given in one forward; no layers are the base model."""

    def score(adapters: Mapping[str, Layers]) -> dict[str, RowScores]:
        for label, layers in adapters.items():
            module.stack.load(label, layers)
        module.scored = {label: label for label in adapters}
        columns = [torch.stack(parts) for parts in zip(*_batches(module, data, split, module.score), strict=True)]
        for label in adapters:
            module.stack.load(label, {})
        return {label: RowScores(*(column[:, i] for column in columns)) for i, label in enumerate(adapters)}

    return score


def ensemble_scores(module: SeedLoRAModule, data: ReasoningGym, split: str, seeds: Mapping[str, Layers]) -> RowScores:
    """The seeds as an ensemble: the mean of their probabilities, token by token."""
    n = len(seeds)
    for label, layers in seeds.items():
        module.stack.load(label, layers)

    def score(batch: Mapping[str, Any]) -> tuple[Tensor, ...]:
        targets = batch["labels"].roll(-1, dims=1)
        keep = targets != IGNORED
        keep[:, -1] = False
        module.stack.route(list(seeds))
        logits = module(batch["input_ids"].repeat(n, 1), keep.repeat(n, 1)).float()
        mean = logits.log_softmax(-1).view(n, -1, logits.shape[-1]).logsumexp(0) - math.log(n)
        losses, right = torch.zeros(keep.shape), torch.ones_like(keep)
        losses[keep] = -mean.gather(1, targets[keep][:, None])[:, 0]
        right[keep] = mean.argmax(-1) == targets[keep]
        return losses.sum(1)[None], right.all(1)[None], keep.sum(1)[None]

    columns = zip(*_batches(module, data, split, score), strict=True)
    return RowScores(*(torch.stack(column)[:, 0] for column in columns))


def _batches(
    module: SeedLoRAModule, data: ReasoningGym, split: str, score: Callable[[Mapping[str, Any]], tuple[Tensor, ...]]
) -> list[tuple[Tensor, ...]]:
    """What ``score`` says of each row, in the order of the rows: losses, exact or not, tokens; of each adapter."""
    rows: dict[int, tuple[Tensor, ...]] = {}
    module.eval()
    with torch.inference_mode(), module.stack.frozen():
        for batch in data.val_dataloader() if split == "val" else data.test_dataloader():
            parts = [part.unbind(1) for part in score(batch)]
            rows.update(zip(batch["items"].tolist(), zip(*parts, strict=True), strict=True))
    return [rows[i] for i in sorted(rows)]


def per_token(scores: RowScores) -> np.ndarray:
    """The loss of each row over the mean tokens of a row: its mean is the loss per token."""
    return (scores.losses.double() / scores.tokens.double().mean()).numpy()


def scaled(layers: Layers, factor: float) -> Layers:
    """An adapter times a number."""
    return {path: LoRAFactors(f.A, f.B * factor) for path, f in layers.items()}


def stack_of(ensemble: SeedEnsembleCallback) -> dict[str, LoRAFactors]:
    """The adapters of an ensemble, read back from its folder."""
    return stack_adapters({str(seed): read_adapter(ensemble.adapter_path(seed)) for seed in ensemble.seeds})


def run_stack(cell: Cell, setting: Setting) -> Line:
    """Train and score one stack of seeds; returns its line."""
    began = time.monotonic()
    module = setting.module(cell)
    data = setting.data(cell.task, module)
    stacks = stack_of(train(cell, setting, module, data))
    trained = time.monotonic()
    seeds = {f"seed_{seed}": partial(members, stacks, [i]) for i, seed in enumerate(cell.seeds)}
    more = _subsets(stacks) if len(seeds) > 3 else _all_rules(stacks, seeds, scorer(module, data, "val"), setting)
    setting.console.print(f"  trained in {trained - began:.0f} s; scoring the test split", highlight=False)
    adapters = {**seeds, BASE: dict, **more.adapters}
    scores = score_lazily(adapters, scorer(module, data, "test"), at_once=AT_ONCE)
    scores["ensemble"] = ensemble_scores(module, data, "test", {label: made() for label, made in seeds.items()})
    found = {label: (per_token(s), s.correct.numpy().astype(float)) for label, s in scores.items()}
    for label, parts in {MEAN_SEED: list(seeds), **more.means}.items():
        found[label] = tuple(np.mean([found[part][metric] for part in parts], axis=0) for metric in (0, 1))
    dropped = {part for parts in more.means.values() for part in parts}
    return {
        "cell": asdict(cell),
        "n": {split: len(rows) for split, rows in data.rows.items()},
        "tokens": int(data.rows["train"].lengths.sum()) * cell.epochs * len(seeds),
        "seconds": {"train": round(trained - began), "score": round(time.monotonic() - trained)},
        "cosine": pairwise(stacks),
        "rho": _short(np.mean([float(shrinkage(gram(f))) for f in stacks.values()])),
        "chosen": more.chosen,
        "compression": more.compression,
        "val": more.val,
        "test": {
            label: {
                **{metric: _short(values.mean()) for metric, values in zip(METRICS, columns, strict=True)},
                "vs": {
                    reference: {
                        metric: _difference(*pair)
                        for metric, *pair in zip(METRICS, columns, found[reference], strict=True)
                    }
                    for reference in (MEAN_SEED, SOUP)
                    if label not in (reference, BASE, *seeds)
                },
            }
            for label, columns in found.items()
            if label not in dropped
        },
    }


@dataclass
class _More:
    """What is scored on the test split beside the seeds.

    Args:
        adapters: by label.
        means: labels for the mean score of several, which are then dropped.
        chosen: what validation chose.
        val: validation losses.
        compression: relative error of rules that give a dense update, which is compressed to the rank of the others.
    """

    adapters: dict[str, Callable[[], Layers]]
    means: dict[str, list[str]] = field(default_factory=dict)
    chosen: dict[str, Any] = field(default_factory=dict)
    val: dict[str, float] = field(default_factory=dict)
    compression: dict[str, float] = field(default_factory=dict)


def _all_rules(stacks: Layers, seeds: Mapping[str, Callable[[], Layers]], score: Score, setting: Setting) -> _More:
    """Every rule, with its numbers chosen on the validation split, and the controls."""
    gains = {name: rule for name, rule in gain_family(list(stacks), powers=POWERS).items() if rule.use.layers == "all"}
    families: dict[str, dict[str, Callable[[], Layers]]] = {
        "gain p": {name: partial(fuse, stacks, rule) for name, rule in gains.items()},
        "soup x scale": {
            name: partial(fuse, stacks, rule) for name, rule in scaled_soups(len(seeds), scales=SCALES).items()
        },
    }
    for name, made in seeds.items():
        own = made()
        families[f"{name} x scale"] = {f"{name} x {x:g}": partial(scaled, own, x) for x in (1.0, *SCALES)}
    tried = {name: made for family in families.values() for name, made in family.items()}
    scores = score_lazily(tried, score, at_once=AT_ONCE)
    more = _More({}, val={name: _short(s.loss) for name, s in scores.items()})
    for family, names in families.items():
        more.chosen[family] = choose({name: scores[name] for name in names})
        more.adapters[family] = tried[more.chosen[family]]
    more.means["seed x scale"] = [f"{name} x scale" for name in seeds]
    for label, (method, options) in RULES.items():
        setting.console.print(f"  fusing by {label}", highlight=False)
        fused = fuse(stacks, bind(method, options))
        more.adapters[label] = partial(dict, fused)
        if fused.compression:
            more.compression[label] = _short(statistics.mean(fused.compression.values()))
    for i, name in enumerate(seeds):
        make = partial(seed_times_gain, stacks, more.adapters["seedlora"](), index=i)
        more.adapters[f"{name} x its gain"] = make
    more.means["seed x seedlora's gain"] = [f"{name} x its gain" for name in seeds]
    return more


def _subsets(stacks: Layers) -> _More:
    """Soup and seedlora of k seeds: the mean of each score over all subsets of k, or five of them."""
    more, n = _More({}), len(next(iter(stacks.values())))
    for method in ("soup", "seedlora"):
        for chosen in subsets(n, most=5):
            if (k := len(chosen)) == 1:
                continue
            label = method if k == n else f"{method} of {','.join(map(str, chosen))}"
            more.adapters[label] = lambda chosen=chosen, method=method: fuse(members(stacks, chosen), bind(method))
            if k < n:
                more.means.setdefault(f"{method} of {k}", []).append(label)
    return more


def run_joint(cell: Cell, setting: Setting) -> Line:
    """Fuse the first seed's adapters of all tasks and score them on every task, with no hint which it is.

    The two views of KnOTS: loss and match over the union of the tasks' items, each task with the same weight, asked in
    the same words; and per task relative to the task's own adapter. One scale per rule, chosen on validation over all
    tasks.
    """
    began = time.monotonic()
    data, own, cosines = {}, {}, {}
    for task in setting.tasks:
        part = Cell(task, cell.rate, cell.seeds, cell.epochs)
        module = setting.module(part)
        data[task] = setting.data(task, module)
        seeds = stack_of(train(part, setting, module, data[task]))
        own[task], cosines[task] = members(seeds, [0]), pairwise(seeds)
    stacks = {path: LoRAFactors.stack([own[task][path] for task in own]) for path in next(iter(own.values()))}
    fused = {rule: fuse(stacks, bind(rule)) for rule in JOINT_RULES}
    made = {f"{rule} x {x:g}": partial(scaled, fused[rule], x) for rule in JOINT_RULES for x in JOINT_SCALES}
    val = [score_lazily(made, scorer(module, rows, "val"), at_once=AT_ONCE) for rows in data.values()]
    total = {name: statistics.mean(scores[name].loss for scores in val) for name in made}
    chosen = {rule: min(JOINT_SCALES, key=lambda x, rule=rule: total[f"{rule} x {x:g}"]) for rule in JOINT_RULES}
    adapters = {BASE: dict, **{f"only {task}": partial(dict, layers) for task, layers in own.items()}}
    adapters |= {rule: made[f"{rule} x {x:g}"] for rule, x in chosen.items()}
    test = {task: score_lazily(adapters, scorer(module, rows, "test"), at_once=AT_ONCE) for task, rows in data.items()}
    return {
        "cell": asdict(cell),
        "n": {task: len(rows.rows["test"]) for task, rows in data.items()},
        "seconds": {"all": round(time.monotonic() - began)},
        "cosine between tasks": pairwise(stacks),
        "cosine between seeds": cosines,
        "chosen": chosen,
        "compression": {
            rule: _short(statistics.mean(layers.compression.values()))
            for rule, layers in fused.items()
            if layers.compression
        },
        "test": {
            label: {
                task: {"loss": _short(scores[label].loss), "match": _short(scores[label].match)}
                for task, scores in test.items()
            }
            for label in adapters
        },
    }


def pairwise(stacks: Layers) -> float:
    """Mean cosine of all pairs of different adapters."""
    cosines = model_cosines(stacks)
    n = len(cosines)
    return _short((cosines.sum() - n) / (n * (n - 1)))


def _difference(a: np.ndarray, b: np.ndarray) -> list[float]:
    found = paired_difference(a, b)
    return [_short(value) for value in (found.value, found.low, found.high)]


def _short(value: float) -> float:
    return round(float(value), 5)


# A session


def read_lines(results: Path) -> list[Line]:
    """The cells done."""
    if not results.is_file():
        return []
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def cell_of(line: Line) -> Cell:
    """The cell of a line."""
    return Cell(**{**line["cell"], "seeds": tuple(line["cell"]["seeds"])})


def seconds_of(cell: Cell, lines: Sequence[Line]) -> float | None:
    """What a cell will take: the median of its like, by tokens of training where epochs or seeds differ."""
    like = [(cell_of(line), line["seconds"]) for line in lines if cell_of(line).task == cell.task]
    if cell.task == JOINT:
        found = [seconds["all"] for _, seconds in like]
    else:
        work = cell.epochs * len(cell.seeds)
        found = [s["train"] * work / (c.epochs * len(c.seeds)) + s["score"] for c, s in like]
    return statistics.median(found) if found else None


def session(
    cells: Sequence[Cell], results: Path, setting: Setting, *, most: int | None = None, minutes: float | None = None
) -> int:
    """Do cells that are not done, in order; returns how many were.

    Args:
        cells: the design.
        results: the file of lines.
        setting: what the cells share.
        most: no more cells than this.
        minutes: begin no cell after so long.
    """
    began, done = time.monotonic(), 0
    results.parent.mkdir(parents=True, exist_ok=True)
    with (results.parent / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another session writes to {results}; wait for it, or end it") from None
        there = {cell_of(line) for line in read_lines(results)}
        waiting = [cell for cell in cells if cell not in there]
        for i, cell in enumerate(waiting):
            if (most is not None and done >= most) or (minutes and time.monotonic() - began > 60 * minutes):
                break
            setting.console.print(f"{len(cells) - len(waiting) + i + 1} of {len(cells)}: {cell.name}", highlight=False)
            line = (run_joint if cell.task == JOINT else run_stack)(cell, setting)
            lines = [*read_lines(results), line]
            write_text(results, "".join(json.dumps(line) + "\n" for line in lines))
            done += 1
            left = [seconds_of(cell, lines) for cell in waiting[i + 1 :]]
            known = sum(filter(None, left)) / 3600
            unknown = f" and {left.count(None)} of unknown length" if None in left else ""
            setting.console.print(f"  done; the other {len(left)} take about {known:.1f} h{unknown}", highlight=False)
    return done


def plan(cells: Sequence[Cell], lines: Sequence[Line], console: Console) -> None:
    """Print the design, with measured and expected seconds."""
    done = {cell_of(line): line for line in lines}
    table = Table(title=f"{len(done)} of {len(cells)} cells done", title_justify="left")
    for header in ("cell", "seconds", "state"):
        table.add_column(header, justify="right" if header == "seconds" else "left")
    left = 0.0
    for cell in cells:
        if cell in done:
            table.add_row(cell.name, str(sum(done[cell]["seconds"].values())), "done")
        else:
            expected = seconds_of(cell, lines)
            left += expected or 0
            table.add_row(cell.name, "?" if expected is None else f"about {expected:.0f}", "")
    console.print(table)
    console.print(f"left: about {left / 3600:.1f} h, as fast as so far", highlight=False)


def main() -> int:
    """Plan, work or sum up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", help="print the cells and the time left")
    parser.add_argument("--summary", action="store_true", help="print tables and write figures beside the results")
    parser.add_argument("--cells", type=int, metavar="N", help="do at most N cells")
    parser.add_argument("--minutes", type=float, metavar="M", help="begin no cell after M minutes")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of one line per cell")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the adapters")
    options = parser.parse_args()
    console, cells = Console(), design()
    if options.plan:
        plan(cells, read_lines(options.results), console)
        return 0
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    setting = Setting(options.work, console=console)
    try:
        session(cells, options.results, setting, most=options.cells, minutes=options.minutes)
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from here")
        return 1
    except ValueError as error:
        console.print(f"error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
