"""The plan of a run, before it starts: who trains how long, and what it takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import lightning.pytorch as pl
from rich.table import Table

from seedlora.model.recomputation import WHOLE_LAYERS
from seedlora.names import EQUAL_TOKENS, OUTER_SEED, WIDE_BATCHES
from seedlora.run.budget import ReplicaBudget, replica_share, replica_steps
from seedlora.run.ensemble import Ensemble
from seedlora.run.ensemble_options import BRANCH, LOCAL, EnsembleOptions
from seedlora.run.halving import steps_of_all
from seedlora.run.memory import Memory, gib, memory_of, trainable_parameters
from seedlora.run.stack_data import HasTokens, JoinsRows, PlannedData

if TYPE_CHECKING:
    from seedlora.training.model_options import ModelOptions
    from seedlora.training.replicas import SweptOptions


@dataclass(frozen=True)
class RunPlan:
    """Hold what will be trained, and what it takes.

    Args:
        seeds: of the replicas.
        replicas: by name the options that a replica has of its own; one per seed unless options are swept.
        passes: how many stacks they are trained in, one after the other.
        budget: ``equal`` or ``full``.
        replica: how long each replica trains.
        steps: optimizer steps of each replica that trains to the end.
        replica_steps: optimizer steps of all replicas together, one with k times the rows as k.
        batch: rows of each replica in an optimizer step.
        rows: training rows.
        tokens: that each replica sees in training.
        supervised: of these, scored.
        padding: part of the tokens of a forward that is padding.
        packing: how rows share a forward and why, for people; None where the data module does not say.
        trainable: parameters of one replica, their mean where the replicas differ.
        base_parameters: of the frozen model.
        memory: estimate for one stack.
        memory_alone: estimate for one seed alone.
        memory_note: how far the estimates can be off, where that is far.
        model: its name.
        data: its name, with validation and test rows.
        merge: the method.
        dtype: of the base weights.
        adapter: what is trained, for people.
        compile: the backend that compiles the layers.
        controls: those that are trained too, for people.
        scheme: how the replicas share the budget, for people; None if each is trained for itself.
        means: which means of the weights are written beside the replicas, for people; None if none are.
        processes: that train, each with the memory estimated.
        left_out: what became of rows that are not used as they are, a sentence for each source that has some.
        note: what was asked for and does nothing.
    """

    seeds: Sequence[int]
    replicas: Mapping[str, SweptOptions]
    passes: int
    budget: str
    replica: ReplicaBudget
    steps: int
    replica_steps: int
    batch: int
    rows: int
    tokens: int
    supervised: int
    padding: float
    trainable: int
    base_parameters: int
    memory: Memory
    memory_alone: Memory
    model: str
    data: str
    merge: str
    dtype: str
    adapter: str
    compile: str | None
    controls: str | None
    scheme: str | None = None
    means: str | None = None
    processes: int = 1
    left_out: Sequence[str] = ()
    note: str | None = None
    packing: str | None = None
    memory_note: str | None = None

    @property
    def one(self) -> str:
        """Return what is trained, for people."""
        return "seed" if len(self.replicas) == len(self.seeds) else "replica"

    @property
    def share(self) -> float:
        """Return the part of the replicas' steps that is trained: what is dropped on the way leaves out the rest."""
        return self.replica_steps / (len(self.replicas) * self.steps)

    @property
    def _swept(self) -> str:
        """Say which options are swept, and how many replicas that makes; empty if none is."""
        values: dict[str, dict[object, None]] = {}
        for own in self.replicas.values():
            for option, value in own.items():
                values.setdefault(option, {})[value] = None
        if not values:
            return ""
        text = "; ".join(f"{option} {', '.join(map(str, each))}" for option, each in values.items())
        return f": {len(self.replicas)} replicas, {text}"

    def table(self) -> Table:
        """Return the plan as a table for the terminal."""
        table = Table(title="The run", title_justify="left", show_header=False)
        n = len(self.replicas)
        epochs = (
            "" if self.replica.epochs is None else f"{_counted(self.replica.epochs, 'epoch')} of {self.rows:,} rows, "
        )
        stacks = "one stack" if self.passes == 1 else f"{self.passes} passes"
        memory = self.memory
        each = "" if self.processes == 1 else f" in each of {self.processes} processes"
        rows = {
            "base model": f"{self.model}, {self.base_parameters / 1e6:,.1f} M parameters, {self.dtype}, frozen",
            "data": self.data,
            "seeds": f"{', '.join(map(str, self.seeds))} in {stacks}" + self._swept,
            "budget": f"{self.budget}: each {self.one} {epochs}{self.steps:,} steps of {self.batch} rows",
            "tokens": (
                f"{self.tokens:,} per {self.one} ({self.supervised:,} of them scored), "
                f"{round(self.share * n * self.tokens):,} in all; "
                f"{self.padding:.0%} padding beside them"
            ),
            "rows": self.packing,
            "adapter": self.adapter,
            "trainable": f"{self.trainable:,} parameters per {self.one}, {n * self.trainable:,} in all",
            "memory": (
                f"about {gib(memory.total)}{each}: base {gib(memory.base)}, adapters {gib(memory.adapters)}, "
                f"optimizer {gib(memory.optimizer)}, activations {gib(memory.activations)}; "
                "beside Python and its libraries" + ("" if self.memory_note is None else f"; {self.memory_note}")
            ),
            "merge": self.merge,
            "compiled": self.compile and f"decoder layers in training, by {self.compile}; the first steps take longer",
            "scheme": self.scheme,
            "means": self.means,
            "controls": self.controls,
            "note": self.note,
        }
        for name, value in rows.items():
            if value is not None:
                table.add_row(name, value)
        return table


def run_plan(trainer: pl.Trainer, options: ModelOptions, data: PlannedData, ensemble: Ensemble) -> RunPlan:
    """Plan a run from its parts, without loading the base model's weights.

    Args:
        trainer: its limits and accumulation count.
        options: of the model to train.
        data: a data module that is set up.
        ensemble: its seeds, budget, stack size and method.
    """
    replicas = ensemble.replicas
    n = len(replicas)
    share = replica_share(ensemble.options, trainer)
    loader = data.train_dataloader()
    steps = replica_steps(share, trainer, data)
    rounds = ensemble.options.halving_rounds(steps)
    rows, sampler = data.rows["train"], loader.sampler
    seen = steps * sampler.rows_per_step
    model = options.outline
    stack = min(n, ensemble.stack_size or n)
    memory = memory_of(trainer, options, data, replicas)
    sizes = [trainable_parameters(options.of_replica(replica.options)) for replica in replicas]
    return RunPlan(
        seeds=ensemble.options.seeds,
        replicas={replica.name: replica.options.swept for replica in replicas},
        passes=math.ceil(n / stack),
        budget=ensemble.options.budget,
        replica=share,
        steps=steps,
        replica_steps=steps_of_all(rounds, steps=steps, n=n),
        batch=sampler.rows_per_step,
        rows=len(rows),
        tokens=int(seen * rows.lengths.mean()),
        supervised=int(seen * rows.num_items.mean()),
        padding=sampler.padding(),
        packing=data.packing.why if isinstance(data, JoinsRows) else None,
        trainable=round(sum(sizes) / n),
        base_parameters=model.parameters,
        memory=memory(stack),
        memory_alone=memory(1),
        model=options.base_model,
        data=_rows(data),
        merge="; ".join(filter(None, (ensemble.method_name, options.averaged_text))),
        dtype=options.base_precision,
        adapter=options.display_text,
        compile=options.compile,
        controls=_controls(ensemble, steps, sampler.rows_per_step, int(seen * rows.lengths.mean())),
        scheme=_scheme(ensemble.options, options, n=n, steps=steps, batch=sampler.rows_per_step),
        means=_means(ensemble.options, steps),
        processes=trainer.world_size,
        left_out=_left_out(data),
        note=ensemble.comparison.nothing_for(n),
        memory_note=_memory_note(trainer, options),
    )


def _memory_note(trainer: pl.Trainer, options: ModelOptions) -> str | None:
    """Say where the memory cannot be known well."""
    if trainer.strategy.root_device.type != "cpu" or options.gradient_checkpointing != WHOLE_LAYERS:
        return None
    return "rough, by a third either way: a CPU's allocator keeps much of what full recomputation frees"


def _controls(ensemble: Ensemble, steps: int, batch: int, tokens: int) -> str | None:
    """Say which controls are trained, and for how many tokens more."""
    if not ensemble.trains_controls:
        return None
    n = len(ensemble.replicas)
    long = f"trained after the seeds: one seed for {n * steps:,} steps"
    if ensemble.options.controls == EQUAL_TOKENS:
        factors = ", ".join(f"{n**power:.3g}" for power in WIDE_BATCHES.values())
        wide = f"one with {n * batch} rows a step for {steps:,}, at {factors} times the learning rate"
        outer = OUTER_SEED in ensemble.folder.controls
        also = f", one for {n * steps:,} with the outer step" if outer else ""
        return f"{long}, {wide}{also}; {(1 + len(WIDE_BATCHES) + outer) * n * tokens:,} tokens more"
    return f"{long}, one of {n} times the rank for {steps:,}; {(n + 1) * tokens:,} tokens more"


def _scheme(options: EnsembleOptions, model: ModelOptions, *, n: int, steps: int, batch: int) -> str | None:
    """Say how the replicas share the budget."""
    parts = []
    if options.scheme == BRANCH:
        shared = options.shared_steps(steps)
        parts.append(
            f"{BRANCH}: for {shared:,} of {steps:,} steps all replicas are one with {n * batch} rows a step, then each "
            "goes on with its own"
        )
    if options.scheme == LOCAL:
        means = options.averaging_steps(steps, model)
        first = f", the first after step {means[0]:,}" if means else ", which end before the first"
        outer = (
            "" if options.outer_learning_rate is None else f", with an outer step of {options.outer_learning_rate:g}"
        )
        parts.append(f"{LOCAL}: all replicas are averaged {len(means):,} times in {steps:,} steps{first}{outer}")
    if rounds := options.halving_rounds(steps):
        left = ", ".join(
            f"{one.left} after step {one.step:,}" + (f" with {one.times} times the rows" if one.times > 1 else "")
            for one in rounds
        )
        saved = 1 - steps_of_all(rounds, steps=steps, n=n) / (n * steps)
        parts.append(
            f"halving: of {n} replicas those with the lower validation losses go on, {left}"
            + (f"; {saved:.0%} of the tokens are saved" if saved else "")
        )
    return "; ".join(parts) or None


def _means(options: EnsembleOptions, steps: int) -> str | None:
    """Say which means of the weights are written."""
    if (decay := options.ema_decay(steps)) is None:
        return None
    return f"an exponential mean of each replica's weights, decay {decay:g}, is written beside it"


def _rows(data: PlannedData) -> str:
    parts = ", ".join(f"{len(part):,} {split}" for split, part in data.rows.items())
    return "; ".join([f"{type(data).__name__}: {parts}", *_seen_in_training(data), *_left_out(data)])


def _seen_in_training(data: PlannedData) -> list[str]:
    """Say how many validation and test rows are training rows as well, whose scores tell of memory."""
    if not isinstance(data, HasTokens):
        return []
    seen = [f"{count:,} of {len(data.rows[split]):,} {split} rows" for split, count in data.seen_in_training().items()]
    return [f"{' and '.join(seen)} occur word for word among the training rows"] if seen else []


def _left_out(data: PlannedData) -> list[str]:
    return [sentence for counts in data.counts.values() if (sentence := counts.sentence())]


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
