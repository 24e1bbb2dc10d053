"""When is a fused adapter better than a seed, and which rule merges best? SmolLM2-135M on three generated tasks.

    python benchmarks/study.py --plan            # the cells, what is done, and the time that the others take
    python benchmarks/study.py --minutes 60      # go on for an hour; killed anywhere, the next call goes on from there
    python benchmarks/study.py --summary         # tables and figures of all cells done; with --only WORD of some

A cell is one stack of seeds on one task with one learning rate, trained and then scored with every way to merge it; or,
as task ``joint``, one adapter of each task, fused across tasks. A cell done is one line of ``study/cells.jsonl`` and is
not done again; the adapters stay under ``--work`` (30 MB a cell). ``--plan`` says what is left. Of the grid of 48 cells
32 are chosen, in the order of what one wants to know next (:func:`design`): longer training, seeds that share their
initial weights (a high cosine), other seeds; then a lower rate, the number of seeds, one order of the data. Three more
train the controls: one seed on the tokens of all, and one of the rank of all.
The first cell of each task scores all rules, as one of longer training does; the others those in which the first three
left a question.

- Gains, scales and p are chosen by the loss on the validation split. The test split is scored once, after that.
- Loss: nats per supervised token, end token included. Match: greedy decoding gives the answer exactly, which needs no
  generation (see ``Scorer.score``). Both on every test item, paired item by item.
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
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student
from torch import Tensor

from seedlora.adapters.reading import read_adapter
from seedlora.callbacks import EnsembleProgressBar, SeedEnsembleCallback
from seedlora.datamodules import ReasoningGym
from seedlora.merge.bound_rule import MergeRule
from seedlora.merge.inputs import stack_adapters
from seedlora.merge.layers import merge_stacks
from seedlora.merge.registry import make_rule
from seedlora.model.embedded import EMBEDDED
from seedlora.names import SETTINGS_NAME, seed_name
from seedlora.report.drawing import COLOURS
from seedlora.scores.intervals import paired_difference
from seedlora.scores.row_scores import RowScores
from seedlora.selection.candidates import gain_family, scaled_soups, seed_times_gain, subsets
from seedlora.selection.choice import Score, choose, greedy_soup, score_lazily
from seedlora.training.losses import IGNORED
from seedlora.training.module import SeedLoRAModule
from seedlora.updates.algebra import factor_grams, gram, in_span, shrinkage, thin_svd
from seedlora.updates.diagnostics import model_cosines
from seedlora.updates.factors import LoRAFactors
from seedlora.updates.stacks import Layers, select_adapters
from seedlora.utils.files import atomic_file, write_text

HERE = Path(__file__).parent
RESULTS, WORK = HERE / "study" / "cells.jsonl", Path("runs/study")

#: Options of the data module; about as many tokens each. The last two have longer questions.
TASKS: Mapping[str, Mapping[str, Any]] = {
    "chain_sum": {"num_train": 480, "num_val": 48, "num_test": 192},
    "leg_counting": {
        "task_options": {"max_animals": 4, "max_instances": 9},
        "num_train": 240,
        "num_val": 32,
        "num_test": 64,
    },
    "gsm_symbolic": {"num_train": 160, "num_val": 24, "num_test": 64},
}
#: Fewer items of each task where adapters of several are scored on all.
JOINT_SIZES = {"num_val": 16, "num_test": 48}
JOINT = "joint"
RATES = (2e-3, 5e-4)
TRIPLES = ((11, 42, 202), (7, 19, 83), (101, 303, 505))
FIVE = (1, 2, 3, 4, 5)
EQUAL, FULL = 1, 3  # epochs of each seed
BATCH, RANK = 8, 8

SCALES = (0.8, 1.25, 1.6)
POWERS = (0.25, 0.5, 0.75)
JOINT_SCALES = (1.0, 2.0)
#: Rules that the first cells of all tasks found no better than soup, alike.
ANSWERED = ("dare", "seedlora, attention", "seedlora, ffn")
#: Prompts of the validation split on which outputs are matched, without their answers.
PROMPTS = 16
JOINT_RULES = ("soup", "seedlora", "ties", "dare_ties", "knots_ties", "knots_dare_ties", "core_ties")
MEAN_SEED, SOUP, BASE = "mean seed", "soup", "base"
METRICS = ("loss", "match")
ADAPTERS_PER_FORWARD = 6  # adapters in one forward
Line = dict[str, Any]


# Rules on trial: they go to seedlora/merge if they earn it


def agreement(stack: LoRAFactors, *, norm: str = "mean") -> LoRAFactors:
    r"""Keep of the mean update what the adapters agree on, one singular direction at a time.

    .. math:: \bar\Delta = \sum_k s_k u_k v_k^\top, \quad c_{nk} = u_k^\top \Delta_n v_k, \quad
        w_k = \frac{(\frac1N \sum_n c_{nk})^2}{\frac1N \sum_n c_{nk}^2}, \quad
        \Delta = g \sum_k w_k s_k u_k v_k^\top

    ``w`` is 1 where all adapters have the same coefficient and 1/N where only one has any. ``g`` restores a norm.

    Cost: ``(D + K) * (N*R)**2`` multiplications and one SVD of size ``N*R``; no ``(D, K)`` matrix is formed.

    Args:
        stack: the adapters of one layer.
        norm: what ``g`` restores: that of the ``mean`` update, or the mean norm of the ``seeds``.

    Returns:
        One adapter of rank at most ``N*R``, in the dtypes of ``stack``.
    """
    n, r = len(stack), stack.rank
    gram_b, gram_a = factor_grams(stack)
    svd = thin_svd(gram_b, gram_a)  # of the sum, which has the directions of the mean
    rows, columns = svd.left.T @ gram_b, gram_a @ svd.right.T
    c_QN = (rows * columns.T).view(-1, n, r).sum(2)
    mean, squares = c_QN.mean(1), c_QN.square().mean(1)
    kept = torch.where(squares > 0, mean**3 / squares, 0.0)
    length = mean.norm() if norm == "mean" else gram(stack).diagonal().clamp_min(0).sqrt().mean()
    gain = length / kept.norm() if kept.norm() > 0 else 1.0
    return in_span(stack, svd.left * (gain * kept), svd.right)


def output_gains(outputs: Layers) -> dict[str, float]:
    r"""Per layer the gain with which the mean update changes its layer's output as much as the adapters do on average.

    .. math:: g = \tfrac1N \textstyle\sum_n \|\Delta_n X\| \, / \, \|\bar\Delta X\|

    Args:
        outputs: of each layer the factors ``A_n X`` (N, R, T) and ``B_n``, for inputs ``X`` (K, T).
    """
    return {path: 1 / max(float(shrinkage(gram(factors))), 1e-7) for path, factors in outputs.items()}


#: Rules that take all they need from the adapters.
RULES: Mapping[str, tuple[str | MergeRule, Mapping[str, Any]]] = {
    "soup": ("soup", {}),
    "seedlora": ("seedlora", {}),
    "ties": ("ties", {}),
    "dare": ("dare_linear", {}),
    "knots_ties": ("knots_ties", {}),
    "two-stage": ("seedlora_subspace", {}),
    "seedlora, attention": ("seedlora", {"layers": "attention", "rest": "soup"}),
    "seedlora, ffn": ("seedlora", {"layers": "ffn", "rest": "soup"}),
    "agreement": (agreement, {}),
    "agreement, seeds' norm": (agreement, {"norm": "seeds"}),
}


@dataclass(frozen=True)
class Cell:
    """One point of the design.

    Args:
        task: of :data:`TASKS`, or ``joint`` for the first seed's adapters of all of them.
        rate: learning rate.
        seeds: of the stack.
        epochs: of each seed.
        vary: what a seed decides.
        controls: whether to train the controls too, and to compare with them.
        rank: of each adapter; ``lora_alpha`` is twice that.
    """

    task: str
    rate: float
    seeds: tuple[int, ...]
    epochs: int
    vary: str = "both"
    controls: bool = False
    rank: int = RANK

    @property
    def name(self) -> str:
        """For people and folders."""
        marks = (
            [self.vary] * (self.vary != "both") + ["controls"] * self.controls + [f"r{self.rank}"] * (self.rank != RANK)
        )
        return "_".join([f"{self.task}_lr{self.rate:g}_{self.epochs}ep_{'-'.join(map(str, self.seeds))}", *marks])


def design(tasks: Sequence[str] = tuple(TASKS)) -> list[Cell]:
    """All cells. Three questions at a time are asked in turns, and each turn asks them on three different tasks."""
    first, second, third = TRIPLES
    high, low = RATES

    def ask(
        seeds: tuple[int, ...] = first, *, rate: float = high, epochs: int = EQUAL, vary: str = "both", **more: bool
    ) -> list[Cell]:
        return [Cell(task, rate, seeds, epochs, vary, **more) for task in tasks]

    def in_turns(*questions: list[Cell]) -> list[Cell]:
        n = len(tasks)
        return [cells[(turn + i) % n] for turn in range(n) for i, cells in enumerate(questions)]

    longer, high_cosine, other_seeds = ask(epochs=FULL), ask(vary="order"), ask(second)
    lower_rate, more_seeds, one_order = ask(rate=low), ask(FIVE), ask(vary="init")
    return [
        *ask(),
        Cell(JOINT, high, first, EQUAL),
        *in_turns(longer, high_cosine, other_seeds),
        *in_turns(lower_rate, more_seeds, one_order),
        *in_turns(ask(third), ask(second, epochs=FULL), ask(rate=low, epochs=FULL)),
        Cell(JOINT, high, second, EQUAL),
        *ask(controls=True),
    ]


def asks_all(cell: Cell) -> bool:
    """Whether a cell scores all rules: the first of each task, and one of longer training.

    The others leave out what the first three answered alike.
    """
    return cell in design()[: len(TASKS)] or cell == Cell("leg_counting", RATES[0], TRIPLES[0], FULL)


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
        return SeedLoRAModule(self.base_model, learning_rate=cell.rate, r=cell.rank, lora_alpha=2 * cell.rank)

    def data(self, task: str, module: SeedLoRAModule, **sizes: int) -> ReasoningGym:
        """The rows of a task, tokenised; ``sizes`` for other than the usual."""
        data = ReasoningGym(task=task, batch_size=BATCH, **{**self.tasks[task], **sizes})
        data.tokenizer = module.tokenizer
        data.setup()
        return data


def train(cell: Cell, setting: Setting, module: SeedLoRAModule, data: ReasoningGym) -> SeedEnsembleCallback:
    """Train the seeds of a cell that have no adapter yet, from the last checkpoint if there is one."""
    folder = setting.work / cell.name
    ensemble = SeedEnsembleCallback(
        cell.seeds,
        merge="none",
        dirpath=folder,
        budget="full",
        vary=cell.vary,
        resume=(folder / SETTINGS_NAME).is_file(),
    )
    if ensemble.pending:
        trainer = pl.Trainer(
            max_epochs=cell.epochs,
            accelerator="cpu",
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
    """Scores adapters on the rows of a split; no layers are the base model."""
    return lambda adapters: module.scorer.score_rows(adapters, _loader(data, split))


def score_seeds(
    module: SeedLoRAModule, data: ReasoningGym, split: str, seeds: Mapping[str, Layers]
) -> dict[str, RowScores]:
    """The seeds, and as ``ensemble`` the mean of their probabilities token by token, from one forward of each."""
    for label, layers in seeds.items():
        module.stack.load(label, layers)
    labels, rows = [*seeds, "ensemble"], dict[int, tuple[Tensor, ...]]()
    module.eval()
    with torch.inference_mode():
        for batch in _loader(data, split):
            following = batch["labels"].roll(-1, 1)
            keep = following != IGNORED
            keep[:, -1] = False
            targets, row = following[keep], keep.nonzero()[:, 0]
            said = []
            for label in seeds:
                module.stack.route([label])
                said.append(module(batch["input_ids"], keep).float().log_softmax(-1))
            said.append(torch.stack(said).logsumexp(0) - math.log(len(said)))
            losses = torch.stack([-logp.gather(1, targets[:, None])[:, 0] for logp in said], 1)
            wrong = torch.stack([logp.argmax(-1) != targets for logp in said], 1).float()
            sums = [torch.zeros(len(keep), len(labels)).index_add(0, row, part) for part in (losses, wrong)]
            tokens = keep.sum(1, keepdim=True).expand(-1, len(labels))
            rows.update(zip(batch["items"].tolist(), zip(sums[0], sums[1] == 0, tokens, strict=True), strict=True))
    for label in seeds:
        module.stack.unload(label)
    found = [torch.stack(column, 1) for column in zip(*(rows[i] for i in sorted(rows)), strict=True)]
    return {label: RowScores(*(part[i] for part in found)) for i, label in enumerate(labels)}


def _loader(data: ReasoningGym, split: str) -> Any:
    return data.val_dataloader() if split == "val" else data.test_dataloader()


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
    began, fresh = time.monotonic(), not (setting.work / cell.name).exists()
    module = setting.module(cell)
    data = setting.data(cell.task, module)
    stacks = stack_of(train(cell, setting, module, data))
    trained = time.monotonic()
    seeds = {seed_name(seed): partial(select_adapters, stacks, [i]) for i, seed in enumerate(cell.seeds)}
    if len(seeds) > 3:
        more = _subsets(stacks)
    else:
        more = _all_rules(stacks, seeds, scorer(module, data, "val"), setting, everything=asks_all(cell))
        _match_outputs(more, stacks, seeds, module, data)
    setting.console.print("  scoring the test split", highlight=False)
    scores = score_seeds(module, data, "test", {label: made() for label, made in seeds.items()})
    scores |= score_lazily({BASE: dict, **more.adapters}, scorer(module, data, "test"), at_once=ADAPTERS_PER_FORWARD)
    scores |= {label: scores[same] for label, same in more.same.items()}
    found = {label: (per_token(s), s.correct.numpy().astype(float)) for label, s in scores.items()}
    for label, parts in {MEAN_SEED: list(seeds), **more.means}.items():
        found[label] = tuple(np.mean([found[part][metric] for part in parts], axis=0) for metric in (0, 1))
    dropped = {part for parts in more.means.values() for part in parts}
    return {
        "cell": asdict(cell),
        "n": {split: len(rows) for split, rows in data.rows.items()},
        "tokens": int(data.rows["train"].lengths.sum()) * cell.epochs * len(seeds),
        # Not known where an earlier session did some of it.
        "seconds": {"train": round(trained - began) if fresh else None, "score": round(time.monotonic() - trained)},
        "cosine": pairwise(stacks),
        "rho": _short(np.mean([float(shrinkage(gram(f))) for f in stacks.values()])),
        "chosen": more.chosen,
        "compression": more.compression,
        "val": more.val,
        "test": _outcomes({k: v for k, v in found.items() if k not in dropped}, list(seeds), (MEAN_SEED, SOUP)),
    }


def _outcomes(
    found: Mapping[str, tuple[np.ndarray, ...]], seeds: Sequence[str], references: Sequence[str]
) -> dict[str, Any]:
    """Loss and match of each adapter, and its differences from the references, from its outcomes by item."""
    return {
        label: {
            **{metric: _short(values.mean()) for metric, values in zip(METRICS, columns, strict=True)},
            "vs": {
                reference: {
                    metric: _difference(*pair) for metric, *pair in zip(METRICS, columns, found[reference], strict=True)
                }
                for reference in references
                if label not in (reference, BASE, *seeds)
            },
        }
        for label, columns in found.items()
    }


def run_controls(cell: Cell, setting: Setting) -> Line:
    """Compare the fused seeds with what their budget buys without merging them.

    ``long seed``: the first seed for as many epochs as all have together. ``wide seed``: the first seed with the rank
    of all together, for the epochs of one. ``best on validation``: of the seeds. ``greedy soup``: its members are those
    that validation chose.
    """
    began = time.monotonic()
    alone = replace(cell, seeds=cell.seeds[:1], controls=False)
    parts = {
        "long seed": replace(alone, epochs=len(cell.seeds) * cell.epochs),
        "wide seed": replace(alone, rank=len(cell.seeds) * cell.rank),
        "seeds": replace(cell, controls=False),
    }
    trained_parts = {}
    for label, part in parts.items():
        module = setting.module(part)
        data = setting.data(cell.task, module)
        trained_parts[label] = stack_of(train(part, setting, module, data))
    stacks, trained = trained_parts.pop("seeds"), time.monotonic()
    seeds = {seed_name(seed): partial(select_adapters, stacks, [i]) for i, seed in enumerate(cell.seeds)}
    on_validation = scorer(module, data, "val")
    val = {
        name: scores.loss for name, scores in score_lazily(seeds, on_validation, at_once=ADAPTERS_PER_FORWARD).items()
    }
    greedy = greedy_soup(stacks, on_validation)
    adapters: dict[str, Callable[[], Layers]] = {
        BASE: dict,
        **seeds,
        SOUP: partial(merge_stacks, stacks, make_rule("soup")),
        "seedlora": partial(merge_stacks, stacks, make_rule("seedlora")),
        "greedy soup": partial(merge_stacks, stacks, greedy),
        **{label: partial(dict, layers) for label, layers in trained_parts.items()},
    }
    scores = score_lazily(adapters, scorer(module, data, "test"), at_once=ADAPTERS_PER_FORWARD)
    scores["best on validation"] = scores[min(val, key=val.__getitem__)]
    found = {label: (per_token(s), s.correct.numpy().astype(float)) for label, s in scores.items()}
    found[MEAN_SEED] = tuple(np.mean([found[seed][metric] for seed in seeds], axis=0) for metric in (0, 1))
    return {
        "cell": asdict(cell),
        "n": {split: len(rows) for split, rows in data.rows.items()},
        "seconds": {"train": round(trained - began), "score": round(time.monotonic() - trained)},
        "chosen": {"greedy soup": [cell.seeds[i] for i in greedy.options["members"]]},
        "val": {name: _short(loss) for name, loss in val.items()},
        "test": _outcomes(found, list(seeds), (MEAN_SEED, SOUP)),
    }


@dataclass
class _More:
    """What is scored on the test split beside the seeds.

    Args:
        adapters: by label.
        same: labels of adapters that are there under another label.
        means: labels for the mean score of several, which are then dropped.
        chosen: what validation chose.
        val: validation losses.
        compression: relative error of rules that give a dense update, which is compressed to the rank of the others.
    """

    adapters: dict[str, Callable[[], Layers]]
    same: dict[str, str] = field(default_factory=dict)
    means: dict[str, list[str]] = field(default_factory=dict)
    chosen: dict[str, Any] = field(default_factory=dict)
    val: dict[str, float] = field(default_factory=dict)
    compression: dict[str, float] = field(default_factory=dict)


def _all_rules(
    stacks: Layers, seeds: Mapping[str, Callable[[], Layers]], score: Score, setting: Setting, *, everything: bool
) -> _More:
    """The rules, with their numbers chosen on the validation split; ``everything`` adds controls and further rules."""
    gains = {
        name: rule for name, rule in gain_family(list(stacks), powers=POWERS).items() if rule.common.layers == "all"
    }
    families: dict[str, dict[str, Callable[[], Layers]]] = {
        "gain p": {name: partial(merge_stacks, stacks, rule) for name, rule in gains.items()},
        "soup x scale": {
            name: partial(merge_stacks, stacks, rule) for name, rule in scaled_soups(len(seeds), scales=SCALES).items()
        },
    }
    for name, made in seeds.items() if everything else ():
        own = made()
        families[f"{name} x scale"] = {f"{name} x {x:g}": partial(scaled, own, x) for x in (1.0, *SCALES)}
    tried = {name: made for family in families.values() for name, made in family.items()}
    scores = score_lazily(tried, score, at_once=ADAPTERS_PER_FORWARD)
    more = _More({}, val={name: _short(s.loss) for name, s in scores.items()})
    for family, names in families.items():
        more.chosen[family] = choose({name: scores[name] for name in names})
        unchanged = more.chosen[family].removesuffix(" x 1")
        if unchanged in (SOUP, *seeds):
            more.same[family] = unchanged
        else:
            more.adapters[family] = tried[more.chosen[family]]
    for label, (method, options) in RULES.items():
        if label in ANSWERED and not everything:
            continue
        setting.console.print(f"  merging by {label}", highlight=False)
        fused = merge_stacks(stacks, make_rule(method, options))
        more.adapters[label] = partial(dict, fused)
        if fused.compression:
            more.compression[label] = _short(statistics.mean(fused.compression.values()))
    if everything:
        for i, name in enumerate(seeds):
            make = partial(seed_times_gain, stacks, more.adapters["seedlora"](), index=i)
            more.adapters[f"{name} x its gain"] = make
        more.means["seed x scale"] = [f"{name} x scale" for name in seeds]
        more.means["seed x seedlora's gain"] = [f"{name} x its gain" for name in seeds]
    return more


def _match_outputs(
    more: _More, stacks: Layers, seeds: Mapping[str, Callable[[], Layers]], module: SeedLoRAModule, data: ReasoningGym
) -> None:
    """Soup with a gain by which it changes outputs on a few prompts as much as a seed does on average.

    One gain per layer, by what the layer's update adds to its output while soup is at work; and one for the model, by
    the logits of the first token to say: how far they are, each less their mean, from those of the base model.
    """
    ids, labels = data.rows["val"].padded(range(min(PROMPTS, len(data.rows["val"]))))
    soup = more.adapters[SOUP]()
    logits, outputs = prompt_logits(module, {SOUP: soup}, ids, labels, stacks)
    gains = output_gains(outputs)
    more.adapters["output gain"] = lambda: {path: LoRAFactors(f.A, f.B * gains[path]) for path, f in soup.items()}
    tried = {name: made() for name, made in seeds.items()} | {f"{x:g}": scaled(soup, x) for x in SCALES}
    logits |= prompt_logits(module, {BASE: {}, **tried}, ids, labels)[0]
    change = {name: float((own - logits[BASE]).norm()) for name, own in logits.items()}
    scales = sorted((1.0, *SCALES))
    changes = [change[SOUP if x == 1 else f"{x:g}"] for x in scales]
    gain = float(np.interp(statistics.mean(change[name] for name in seeds), changes, scales))
    more.adapters["output gain, one"] = partial(scaled, soup, gain)
    more.chosen |= {"output gain": _short(statistics.mean(gains.values())), "output gain, one": _short(gain)}


@torch.no_grad()
def prompt_logits(
    module: SeedLoRAModule, adapters: Mapping[str, Layers], ids: Tensor, labels: Tensor, stacks: Layers | None = None
) -> tuple[dict[str, Tensor], dict[str, LoRAFactors]]:
    """What adapters make of prompts, whose answers no adapter sees.

    Args:
        module: the model.
        adapters: by name, one after the other.
        ids: rows of tokens.
        labels: of the rows; the first one of each ends its prompt.
        stacks: updates to watch.

    Returns:
        By name the logits of the token after the prompt, less their mean, (rows, V); and by layer the factors ``A_n X``
        and ``B_n`` of the updates to watch, for the inputs X of the layer at all tokens of the prompts, under the last
        adapter.
    """
    prompt = (labels != IGNORED).cumsum(1) == 0
    last = prompt & ~prompt.roll(-1, 1)
    outputs: dict[str, LoRAFactors] = {}

    def watch(path: str, stack: LoRAFactors) -> Callable[[Any, Any], None]:
        def seen(_: Any, inputs: tuple[Tensor, ...]) -> None:
            outputs[path] = LoRAFactors(stack.A @ inputs[0][prompt].T.to(stack.A.dtype), stack.B)

        return seen

    module.eval()
    hooks = [module.stack.layers[path].register_forward_pre_hook(watch(path, f)) for path, f in (stacks or {}).items()]
    logits = {}
    try:
        for name, layers in adapters.items():
            module.stack.load(name, layers)
            module.stack.route([name])
            said = module(ids, last).float()
            logits[name] = said - said.mean(1, keepdim=True)
            module.stack.unload(name)
    finally:
        for hook in hooks:
            hook.remove()
    return logits, outputs


def _subsets(stacks: Layers) -> _More:
    """Soup and seedlora of k seeds: the mean of each score over all subsets of k, or five of them."""
    more, n = _More({}), len(next(iter(stacks.values())))
    for method in ("soup", "seedlora"):
        for chosen in subsets(n, most=5):
            if (k := len(chosen)) == 1:
                continue
            label = method if k == n else f"{method} of {','.join(map(str, chosen))}"
            more.adapters[label] = lambda chosen=chosen, method=method: merge_stacks(
                select_adapters(stacks, chosen), make_rule(method)
            )
            if k < n:
                more.means.setdefault(f"{method} of {k}", []).append(label)
    return more


def run_joint(cell: Cell, setting: Setting) -> Line:
    """Merge the first seed's adapters of all tasks and score them on every task, with no hint which it is.

    The two views of KnOTS: loss and match over the union of the tasks' items, each task with the same weight, asked in
    the same words; and per task relative to the task's own adapter. One scale per rule, chosen on validation over all
    tasks.
    """
    began = time.monotonic()
    data, own, by_task = {}, {}, {}
    for task in setting.tasks:
        part = Cell(task, cell.rate, cell.seeds, cell.epochs)
        module = setting.module(part)
        by_task[task] = stack_of(train(part, setting, module, setting.data(task, module)))
        data[task] = setting.data(task, module, **JOINT_SIZES)
        own[task] = select_adapters(by_task[task], [0])
    stacks = {path: LoRAFactors.stack([own[task][path] for task in own]) for path in next(iter(own.values()))}
    fused = {rule: merge_stacks(stacks, make_rule(rule)) for rule in JOINT_RULES}
    made = {f"{rule} x {x:g}": partial(scaled, fused[rule], x) for rule in JOINT_RULES for x in JOINT_SCALES}
    val = [score_lazily(made, scorer(module, rows, "val"), at_once=ADAPTERS_PER_FORWARD) for rows in data.values()]
    total = {name: statistics.mean(scores[name].loss for scores in val) for name in made}
    chosen = {rule: min(JOINT_SCALES, key=lambda x, rule=rule: total[f"{rule} x {x:g}"]) for rule in JOINT_RULES}
    adapters = {BASE: dict, **{f"only {task}": partial(dict, layers) for task, layers in own.items()}}
    adapters |= {rule: made[f"{rule} x {x:g}"] for rule, x in chosen.items()}
    test = {
        task: score_lazily(adapters, scorer(module, rows, "test"), at_once=ADAPTERS_PER_FORWARD)
        for task, rows in data.items()
    }
    return {
        "cell": asdict(cell),
        "n": {task: len(rows.rows["test"]) for task, rows in data.items()},
        "seconds": {"all": round(time.monotonic() - began)},
        "cosine": cosines_of(by_task),
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


def cosines_of(by_task: Mapping[str, Layers]) -> dict[str, float]:
    """Mean cosines of pairs of adapters by what they share: the task, the seed (so the initial A), or neither."""
    stacks = list(by_task.values())
    cosines = model_cosines({path: LoRAFactors.stack([part[path] for part in stacks]) for path in stacks[0]})
    tasks, seeds = (f(torch.arange(len(cosines)), len(cosines) // len(stacks)) for f in (torch.div, torch.remainder))
    same_task, same_seed = (part[:, None] == part for part in (tasks.floor(), seeds))
    shared = {"task": same_task & ~same_seed, "seed": same_seed & ~same_task, "neither": ~same_task & ~same_seed}
    return {name: _short(cosines[pairs].mean()) for name, pairs in shared.items()}


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


def run(cell: Cell, setting: Setting) -> Line:
    """Do one cell; returns its line."""
    if cell.task == JOINT:
        return run_joint(cell, setting)
    return (run_controls if cell.controls else run_stack)(cell, setting)


def read_lines(results: Path) -> list[Line]:
    """The cells done."""
    if not results.is_file():
        return []
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def cell_of(line: Line) -> Cell:
    """The cell of a line."""
    return Cell(**{**line["cell"], "seeds": tuple(line["cell"]["seeds"])})


def _seconds(line: Line) -> str:
    return "" if None in line["seconds"].values() else str(sum(line["seconds"].values()))


def seconds_of(cell: Cell, lines: Sequence[Line]) -> float | None:
    """What a cell will take: the median of its like, by tokens of training where epochs or seeds differ."""
    like = [
        (c, line["seconds"]) for line in lines if (c := cell_of(line)).task == cell.task and c.controls == cell.controls
    ]
    if cell.task == JOINT:
        found = [seconds["all"] for _, seconds in like]
    else:
        work = cell.epochs * len(cell.seeds)
        found = [s["train"] * work / (c.epochs * len(c.seeds)) + s["score"] for c, s in like if s["train"] is not None]
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
    with results.with_name(f".{results.name}.lock").open("w") as lock:
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
            line = run(cell, setting)
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
            table.add_row(cell.name, _seconds(done[cell]), "done")
        else:
            expected = seconds_of(cell, lines)
            left += expected or 0
            table.add_row(cell.name, "?" if expected is None else f"about {expected:.0f}", "")
    console.print(table)
    console.print(f"left: about {left / 3600:.1f} h, as fast as so far", highlight=False)


# The summary


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval of Student's t; of one value the interval is unknown (NaN)."""
    n, mean = len(values), statistics.mean(values)
    if n < 2:
        return mean, math.nan, math.nan
    half = float(student.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return mean, mean - half, mean + half


@dataclass(frozen=True)
class Compared:
    """A method against a reference over several cells.

    Args:
        mean: of the differences.
        low: end of the interval over clusters; over items, if there is one cell alone.
        high: the other end.
        clusters: how many.
        cells: how many.
        less: cells in which the interval over items is below 0.
        more: cells in which it is above 0.
    """

    mean: float
    low: float
    high: float
    clusters: int
    cells: int
    less: int
    more: int


def compare(lines: Sequence[Line], label: str, reference: str, metric: str) -> Compared | None:
    """Pool one method's differences; a cluster is a task with a set of seeds. ``None`` where there are none."""
    clusters: dict[tuple[str, tuple[int, ...]], list[float]] = defaultdict(list)
    less = more = 0
    value = low = high = math.nan
    for line in lines:
        if (found := line["test"].get(label, {}).get("vs", {}).get(reference)) is None:
            continue
        value, low, high = found[metric]
        cell = cell_of(line)
        clusters[cell.task, cell.seeds].append(value)
        less, more = less + (high < 0), more + (low > 0)
    if not clusters:
        return None
    cells = sum(map(len, clusters.values()))
    over_clusters = t_interval([statistics.mean(values) for values in clusters.values()])
    return Compared(*(over_clusters if cells > 1 else (value, low, high)), len(clusters), cells, less, more)


def against_one_seed(lines: Sequence[Line], label: str, metric: str) -> tuple[float, float, float, int] | None:
    """A method on seeds of the equal budget, less the mean of the same seeds with all of the budget each.

    Returns:
        Mean, interval over clusters, and cells; ``None`` where there are none.
    """
    by_cell = {cell_of(line): line["test"] for line in lines}
    clusters: dict[tuple[str, tuple[int, ...]], list[float]] = defaultdict(list)
    for cell, test in by_cell.items():
        full = by_cell.get(Cell(cell.task, cell.rate, cell.seeds, FULL, cell.vary))
        if cell.epochs == EQUAL and full is not None and label in test:
            clusters[cell.task, cell.seeds].append(test[label][metric] - full[MEAN_SEED][metric])
    if not clusters:
        return None
    means = [statistics.mean(values) for values in clusters.values()]
    return *t_interval(means), sum(map(len, clusters.values()))


def summary(lines: Sequence[Line], console: Console, folder: Path | None = None) -> None:
    """Print all tables, and draw the figures into ``folder``."""
    stacks = [line for line in lines if (cell := cell_of(line)).task != JOINT and not cell.controls]
    triples = [line for line in stacks if len(line["cell"]["seeds"]) == 3]
    plain = [line for line in triples if line["cell"]["vary"] == "both"]
    _settings_table(stacks, console)
    for epochs, name in ((EQUAL, "equal budget"), (FULL, "full budget")):
        if some := [line for line in plain if line["cell"]["epochs"] == epochs]:
            _methods_table(some, f"{name}, {epochs} epoch{'s' * (epochs > 1)} of each seed", console)
    for vary in ("order", "init"):
        if some := [line for line in triples if line["cell"]["vary"] == vary]:
            _methods_table(some, f"seeds that differ in {vary} only", console)
    _by_condition_table(triples, console)
    _by_cosine_table(triples, console)
    _lengths_table(triples, console)
    _compression_table(triples, console)
    _one_seed_table(plain, console)
    controls = [line for line in lines if cell_of(line).controls]
    for line in controls:
        _controls_table(line, console)
    if len(controls) > 1:
        _methods_table(controls, "controls", console)
    _count_table([line for line in stacks if len(line["cell"]["seeds"]) > 3], console)
    _vary_table(triples, console)
    for line in lines:
        if line["cell"]["task"] == JOINT:
            _joint_table(line, console)
    if folder is not None:
        for name, figure in _figures(triples, stacks).items():
            with atomic_file(folder / name) as file, rc_context({"svg.hashsalt": "seedlora"}):
                figure.savefig(file, format="svg", metadata={"Date": None})
            console.print(f"figure: {folder / name}", highlight=False, soft_wrap=True)


def _table(console: Console, title: str, headers: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> None:
    if not rows:
        return
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for i, header in enumerate(headers):
        table.add_column(header, justify="right" if i else "left", overflow="fold", no_wrap=not i)
    for row in rows:
        table.add_row(*row)
    console.print()
    console.print(table)


def _settings_table(stacks: Sequence[Line], console: Console) -> None:
    rows = []
    for line in stacks:
        cell, test = cell_of(line), line["test"]
        seeds = [test[seed_name(seed)] for seed in cell.seeds]
        spread = {metric: statistics.stdev(seed[metric] for seed in seeds) for metric in METRICS}
        loss, match = (test[MEAN_SEED][metric] for metric in METRICS)
        losses = (f"{test[BASE]['loss']:.3f}", f"{loss:.3f} ± {spread['loss']:.3f}")
        matches = f"{100 * match:.1f} ± {100 * spread['match']:.1f}"
        rows.append((cell.name, str(line["n"]["test"]), f"{line['cosine']:.3f}", *losses, matches, _seconds(line)))
    headers = ("cell", "test items", "cosine", "base loss", "loss of a seed", "match of a seed, %", "seconds")
    _table(console, "Cells", headers, rows, "mean seed ± spread between seeds; cosine of the updates, all pairs")


def _methods_table(lines: Sequence[Line], title: str, console: Console) -> None:
    labels = list(dict.fromkeys(label for line in lines for label in line["test"]))
    rows = []
    for label in labels:
        found = {
            (metric, reference): compare(lines, label, reference, metric)
            for metric in METRICS
            for reference in (MEAN_SEED, SOUP)
        }
        if any(found.values()):
            against = found["loss", SOUP]
            counts = "" if against is None else f"{against.less} / {against.more} of {against.cells}"
            shown = [_interval(found[key], 1 if key[0] == "loss" else 100) for key in found]
            rows.append((label, *shown[:2], counts, *shown[2:]))
    first = compare(lines, SOUP, MEAN_SEED, "loss")
    caption = (
        f"less is better for loss, more for match; cells: {len(lines)}, in clusters, a task with a set of seeds: "
        f"{first.clusters if first else 0}; in ( ) Student's t over clusters, in [ ] over the items of a single cell; "
        "lower / higher: the interval over items leaves 0 out"
    )
    headers = ("method", "loss - mean seed", "loss - soup", "lower / higher", "match - mean seed", "match - soup")
    _table(console, f"Differences, {title}; loss in nats per token, match in points", headers, rows, caption)


def _interval(found: Compared | None, factor: float) -> str:
    if found is None:
        return ""
    return (_over_items if found.cells == 1 else _spread)((found.mean, found.low, found.high), factor)


def _spread(interval: Sequence[float], factor: float) -> str:
    digits = 3 if factor == 1 else 1
    mean, low, high = (f"{factor * value:+.{digits}f}" for value in interval[:3])
    return mean if math.isnan(interval[1]) else f"{mean} ({low} to {high})"


def _over_items(interval: Sequence[float], factor: float) -> str:
    return _spread(interval, factor).replace("(", "[").replace(")", "]")


_SHOWN = ("gain p", "soup x scale", "seedlora", "ties", "knots_ties", "two-stage", "ensemble")
_SHOWN += ("agreement", "output gain")


def condition(cell: Cell) -> str:
    """What cells of different tasks and seeds share."""
    vary = "" if cell.vary == "both" else f", {cell.vary} only"
    return f"{cell.epochs} epoch{'s' * (cell.epochs > 1)}, rate {cell.rate:g}{vary}"


def _by_condition_table(lines: Sequence[Line], console: Console) -> None:
    by_condition: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        by_condition[condition(cell_of(line))].append(line)
    groups = sorted(by_condition.items(), key=lambda group: statistics.mean(line["cosine"] for line in group[1]))
    counts = [str(len(some)) for _, some in groups]
    cosines = [f"{statistics.mean(line['cosine'] for line in some):.3f}" for _, some in groups]
    rows = [("cells", *counts), ("mean cosine", *cosines)]
    for metric, factor in zip(METRICS, (1, 100), strict=True):
        first = [_interval(compare(some, SOUP, MEAN_SEED, metric), factor) for _, some in groups]
        rows.append((f"{metric}: {SOUP} - {MEAN_SEED}", *first))
        for label in _SHOWN:
            found = [_interval(compare(some, label, SOUP, metric), factor) for _, some in groups]
            if any(found):
                rows.append((f"{metric}: {label} - {SOUP}", *found))
    caption = (
        "means over cells; in ( ) Student's t over clusters, in [ ] over the items of a single cell; loss in nats per "
        "token, match in points"
    )
    _table(console, "By condition, least cosine first", ("", *(name for name, _ in groups)), rows, caption)


def _by_cosine_table(lines: Sequence[Line], console: Console) -> None:
    rows = []
    for line in sorted(lines, key=lambda line: line["cosine"]):
        cell, test = cell_of(line), line["test"]
        values = {label: test[label]["vs"][SOUP]["loss"][0] for label in _SHOWN if label in test}
        best = min(values.values())
        shown = {label: f"{'*' if value == best else ''}{value:+.3f}" for label, value in values.items()}
        cells = [shown.get(label, "") for label in _SHOWN]
        rows.append((cell.name, f"{line['cosine']:.3f}", f"{-test[SOUP]['vs'][MEAN_SEED]['loss'][0]:+.3f}", *cells))
    headers = ("cell", "cosine", "mean seed", *_SHOWN)
    _table(console, "Loss less that of soup, by cosine", headers, rows, "less is better; * the least of the row")


def _lengths_table(lines: Sequence[Line], console: Console) -> None:
    rows = []
    for line in lines:
        chosen = line["chosen"]
        matched = [f"{chosen[name]:.2f}" if name in chosen else "" for name in ("output gain", "output gain, one")]
        rows.append((cell_of(line).name, f"{1 / line['rho']:.2f}", *matched, chosen["gain p"], chosen["soup x scale"]))
    headers = ("cell", "weights", "outputs of layers", "logits", "chosen by gain p", "by soup x scale")
    caption = "mean over layers, but for the logits; the last two: what the validation loss chose"
    _table(console, "The gain that makes soup as long as a seed", headers, rows, caption)


def _compression_table(lines: Sequence[Line], console: Console) -> None:
    dense = list(dict.fromkeys(label for line in lines for label in line.get("compression", {})))
    rows = [
        (cell_of(line).name, *(f"{e:.2f}" if (e := line["compression"].get(label)) else "" for label in dense))
        for line in lines
        if line.get("compression")
    ]
    caption = "relative error of the dense rules, compressed to the rank of the seeds together; mean over layers"
    _table(console, "Compression", ("cell", *dense), rows, caption)


def _one_seed_table(lines: Sequence[Line], console: Console) -> None:
    rows = []
    for label in (MEAN_SEED, SOUP, "seedlora", "gain p", "soup x scale", "ensemble"):
        found = {metric: against_one_seed(lines, label, metric) for metric in METRICS}
        if (loss := found["loss"]) is not None and (match := found["match"]) is not None:
            rows.append((label, _spread(loss, 1), _spread(match, 100), str(loss[3])))
    title = f"Equal budget: three seeds of {EQUAL} epoch less one seed of {FULL} epochs"
    _table(
        console, title, ("method", "loss", "match, points", "cells"), rows, "the mean of the same seeds, trained longer"
    )


def _controls_table(line: Line, console: Console) -> None:
    rows = []
    for label, found in line["test"].items():
        values = (f"{found['loss']:.3f}", f"{100 * found['match']:.1f}")
        versus = [
            _over_items(found["vs"][reference][metric], factor) if reference in found["vs"] else ""
            for reference in (MEAN_SEED, SOUP)
            for metric, factor in zip(METRICS, (1, 100), strict=True)
        ]
        rows.append((label, *values, *versus))
    of = [f"{metric} - {reference}" for reference in (MEAN_SEED, SOUP) for metric in METRICS]
    members = ", ".join(map(str, line["chosen"]["greedy soup"]))
    caption = f"test items: {line['n']['test']}; greedy soup of seeds {members}; intervals over items"
    _table(console, f"Controls: {cell_of(line).name}", ("adapter", "loss", "match, %", *of), rows, caption)


def _count_table(lines: Sequence[Line], console: Console) -> None:
    rows = []
    for line in lines:
        cell, test = cell_of(line), line["test"]
        n = len(cell.seeds)
        for k in range(1, n + 1):
            names = [MEAN_SEED] * 2 if k == 1 else [m if k == n else f"{m} of {k}" for m in ("soup", "seedlora")]
            values = [f"{test[name]['loss']:.3f}, {100 * test[name]['match']:.1f}" for name in names]
            rows.append((cell.name if k == 1 else "", str(k), *values))
    headers = ("cell", "seeds", "soup", "seedlora")
    _table(console, "Number of seeds: loss, match in %", headers, rows, "mean over subsets of the seeds")


def _vary_table(lines: Sequence[Line], console: Console) -> None:
    alike: dict[Cell, dict[str, Line]] = defaultdict(dict)
    for line in lines:
        cell = cell_of(line)
        alike[replace(cell, vary="both")][cell.vary] = line
    rows = []
    for cell, by_vary in alike.items():
        for vary in ("both", "init", "order") if len(by_vary) > 1 else ():
            if (found := by_vary.get(vary)) is not None:
                test = found["test"]
                values = [_over_items(test[label]["vs"][MEAN_SEED]["loss"], 1) for label in ("soup", "seedlora")]
                rows.append((cell.name, vary, f"{found['cosine']:.3f}", *values))
    headers = ("cell", "varied", "cosine", "soup - mean seed", "seedlora - mean seed")
    _table(console, "What a seed decides: loss", headers, rows, "intervals over items")


def normalised(test: Mapping[str, Mapping[str, Mapping[str, float]]], label: str) -> dict[str, dict[str, float]]:
    """KnOTS' per-task view: match over that of the task's own adapter, and the share of its loss reduction kept.

    Args:
        test: by label and task ``loss`` and ``match``; ``base`` and ``only TASK`` are among the labels.
        label: whose.

    Returns:
        Per task ``match`` (NaN where the own adapter has none) and ``kept``.
    """
    found = {}
    for task, values in test[label].items():
        own, base = test[f"only {task}"][task], test[BASE][task]
        found[task] = {
            "match": values["match"] / own["match"] if own["match"] else math.nan,
            "kept": (base["loss"] - values["loss"]) / (base["loss"] - own["loss"]),
        }
    return found


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.0f}"


def _joint_table(line: Line, console: Console) -> None:
    test, tasks = line["test"], list(line["n"])
    rows = []
    for label, values in test.items():
        joint = [statistics.mean(values[task][metric] for task in tasks) for metric in METRICS]
        per_task = normalised(test, label)
        matches = [v["match"] for v in per_task.values() if not math.isnan(v["match"])]
        scale = f" x {line['chosen'][label]:g}" if label in line["chosen"] else ""
        shown = [f"{100 * v['kept']:.0f}, {_percent(v['match'])}" for v in per_task.values()]
        kept = f"{100 * statistics.mean(v['kept'] for v in per_task.values()):.0f}"
        match = f"{100 * statistics.mean(matches):.0f}" if matches else ""
        rows.append((f"{label}{scale}", f"{joint[0]:.3f}", f"{100 * joint[1]:.1f}", *shown, kept, match))
    cosines = ", ".join(f"{shared} {value:.3f}" for shared, value in line["cosine"].items())
    caption = (
        "loss and match over all tasks' items, equal weights; per task, % of its own adapter's: loss reduction, match; "
        f"items: {', '.join(f'{task} {n}' for task, n in line['n'].items())}. Cosine of "
        f"adapters that share {cosines}"
    )
    headers = ("adapter", "loss", "match, %", *tasks, "mean kept", "mean match")
    _table(console, f"One adapter for all tasks: {cell_of(line).name}", headers, rows, caption)


def _figures(triples: Sequence[Line], stacks: Sequence[Line]) -> dict[str, Figure]:
    """Methods against soup by cosine, a panel for each and a scale for each row; and the number of seeds."""
    figures = {}
    if triples:
        figure = Figure(figsize=(8, 6), layout="constrained")
        panels = figure.subplots(3, 2, sharex=True, sharey="row")
        tasks = list(dict.fromkeys(cell_of(line).task for line in triples))
        for axes, label in zip(
            panels.flat, (MEAN_SEED, "gain p", "seedlora", "knots_ties", "ties", "two-stage"), strict=True
        ):
            for line in triples:
                value = line["test"][label]["loss"] - line["test"][SOUP]["loss"]
                colour = COLOURS[tasks.index(line["cell"]["task"])]
                axes.plot(line["cosine"], value, _marker(cell_of(line)), color=colour, alpha=0.7, markeredgewidth=0)
            axes.axhline(0, color="grey", linewidth=0.8, zorder=0)
            axes.set_title(label, fontsize="medium")
        figure.supxlabel("mean pairwise cosine of the seeds", fontsize="medium")
        figure.supylabel("test loss less that of soup, nats per token", fontsize="medium")
        kinds = {"1 epoch": "o", "3 epochs": "^", "init only": "D", "order only": "s"}
        keys = [
            Line2D([], [], ls="", marker="o", color=colour, label=task)
            for task, colour in zip(tasks, COLOURS, strict=False)
        ]
        keys += [Line2D([], [], ls="", marker=marker, color="grey", label=kind) for kind, marker in kinds.items()]
        figure.legend(
            handles=keys,
            loc="outside upper center",
            ncols=len(keys),
            fontsize="small",
            frameon=False,
            columnspacing=1,
            handletextpad=0.2,
        )
        figures["by_cosine.svg"] = figure
    if many := [line for line in stacks if len(line["cell"]["seeds"]) > 3]:
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        for colour, line in zip(COLOURS, many, strict=False):
            n, test = len(line["cell"]["seeds"]), line["test"]
            for method, style in (("soup", "-"), ("seedlora", "--")):
                names = [MEAN_SEED, *(f"{method} of {k}" for k in range(2, n)), method]
                value = [test[name]["loss"] - test[MEAN_SEED]["loss"] for name in names]
                axes.plot(
                    range(1, n + 1), value, style, marker=".", color=colour, label=f"{line['cell']['task']}, {method}"
                )
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set(xlabel="seeds fused", ylabel="test loss less that of a seed, nats per token", xticks=range(1, n + 1))
        figure.legend(loc="outside upper center", ncols=len(many), fontsize="small", frameon=False)
        figures["seeds.svg"] = figure
    return figures


def _marker(cell: Cell) -> str:
    if cell.vary != "both":
        return {"order": "s", "init": "D"}[cell.vary]
    return "o" if cell.epochs == EQUAL else "^"


def main() -> int:
    """Plan, work or sum up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", help="print the cells and the time left")
    parser.add_argument("--summary", action="store_true", help="print tables and write figures beside the results")
    parser.add_argument("--cells", type=int, metavar="N", help="do at most N cells")
    parser.add_argument("--minutes", type=float, metavar="M", help="begin no cell after M minutes")
    parser.add_argument("--only", default="", metavar="WORD", help="cells with this in their name, joint for example")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of one line per cell")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the adapters")
    options = parser.parse_args()
    console, cells = Console(), [cell for cell in design() if options.only in cell.name]
    if not cells:
        console.print(f"error: no cell has '{options.only}' in its name; --plan prints the names")
        return 2
    if options.plan:
        plan(cells, read_lines(options.results), console)
        return 0
    if options.summary:
        lines = [line for line in read_lines(options.results) if options.only in cell_of(line).name]
        if not lines:
            console.print(f"error: {options.results} holds no such cell yet; run the same without --summary")
            return 2
        summary(lines, console, None if options.only else options.results.parent)
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
