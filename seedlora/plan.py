"""The plan of a run, before it starts: who trains how long, and what it takes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from rich.table import Table

from seedlora.atomic import read_record, write_text
from seedlora.base_model import attention, identity, outline
from seedlora.head import chunk_rows
from seedlora.quantization import QUANTIZATIONS
from seedlora.strategies import ONE_PROCESS, Sharding, sharding

if TYPE_CHECKING:
    from seedlora.module import SeedLoRAModule

BUDGETS = ("equal", "full")
#: Whose versions a run writes down.
LIBRARIES = ("seedlora", "torch", "lightning", "transformers", "tokenizers", "peft", "numpy")


@dataclass(frozen=True)
class ReplicaBudget:
    """How long each replica trains: whole epochs, or optimizer steps, whichever ends first; ``None`` is no limit."""

    epochs: int | None
    steps: int | None

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of a replica, given those of an epoch."""
        limits = [] if self.steps is None else [self.steps]
        if self.epochs is not None:
            limits.append(self.epochs * steps_per_epoch)
        return min(limits)


def replica_budget(budget: str, *, n: int, max_epochs: int | None, max_steps: int) -> ReplicaBudget:
    """Divide the trainer's ``max_epochs`` and ``max_steps`` among ``n`` replicas, or give each all of it.

    Args:
        budget: ``equal`` divides by ``n``, so that the ensemble costs what one seed would; ``full`` does not.
        n: number of seeds of the ensemble.
        max_epochs: of the trainer; ``None`` or -1 is no limit.
        max_steps: of the trainer; -1 is no limit.

    Raises:
        ValueError: for an unknown budget, no limit at all, or a limit that ``n`` does not divide.
    """
    if budget not in BUDGETS:
        raise ValueError(f"Unknown ensemble.budget '{budget}'; choose one of {', '.join(BUDGETS)}")
    limits = {
        "max_epochs": None if max_epochs in (None, -1) else max_epochs,
        "max_steps": None if max_steps == -1 else max_steps,
    }
    if all(limit is None for limit in limits.values()):
        raise ValueError("the run has no end: set trainer.max_epochs or trainer.max_steps")
    if budget == "equal":
        for name, limit in limits.items():
            if limit is not None and (limit % n or limit == 0):
                raise ValueError(
                    f"ensemble.budget equal shares trainer.{name} {limit} among {n} seeds, which does not divide "
                    f"evenly; set --trainer.{name} to a multiple of {n}, or --ensemble.budget full to give each seed "
                    f"all {limit}"
                )
        limits = {name: None if limit is None else limit // n for name, limit in limits.items()}
    return ReplicaBudget(limits["max_epochs"], limits["max_steps"])


@dataclass(frozen=True)
class Memory:
    """Estimated bytes by part."""

    base: int
    adapters: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All parts together."""
        return self.base + self.adapters + self.optimizer + self.activations


def memory_estimate(
    *,
    base_parameters: int,
    base_bytes: int,
    trainable: int,
    tokens: int,
    supervised: int,
    layers: int,
    hidden: int,
    intermediate: int,
    vocabulary: int,
    scores: int = 0,
    checkpointing: bool = False,
    quantized: int = 0,
    quantized_bytes: float = 0,
    largest: int = 0,
    frozen: int = 0,
    rescaled: int = 0,
    copies: int = 0,
    all_logits: bool = False,
    stage: int = 0,
    processes: int = 1,
    gathered: int = 0,
) -> Memory:
    """Bytes that a training step needs, beside Python and its libraries.

    ``base_parameters * base_bytes`` for the frozen weights; 4 bytes for an adapter's weight and 4 for its gradient; 8
    for AdamW's two moments. Activations kept for the backward pass of a Llama-like layer, per token:
    ``base_bytes * (7 * hidden + 4 * intermediate) + 8 * hidden``: the inputs of the adapters, queries, keys, values and
    what comes out of the attention, the feed-forward's parts, and the two norms' float32. An attention that keeps its
    scores adds them in the model's dtype and in float32. For each supervised token two
    hidden states; for those of one chunk (:func:`seedlora.head.chunk_rows`) the logits in the model's dtype and twice
    in float32. Gradient checkpointing keeps ``base_bytes * hidden`` per token and layer, and recomputes one layer at a
    time. A model family that scales or caps its logits takes all of them at once, which is more.

    Modules that are trained in full are trained parameters like an adapter's, and are kept once more in the base's
    dtype for the backward pass. A head among them takes all logits at once: ``2 * base_bytes + 12`` for each.

    A quantised weight takes ``quantized_bytes``, and the largest layer is whole while it is multiplied. DoRA keeps the
    outputs of its layers before they are rescaled.

    Of several processes each holds its part: of AdamW's moments from ZeRO's stage 1, where DeepSpeed keeps another 4
    bytes for its part of the trained weights (not in stage 3, where they are the weights), of the gradients from stage
    2, of the base model in stage 3 and under FSDP2, and there ``gathered`` parameters whole. The trained weights are
    counted whole: ZeRO-3 keeps parameters whole that are as small as an adapter's.

    Args:
        base_parameters: of the frozen model.
        base_bytes: per weight of it.
        trainable: adapter parameters of the replicas trained at once.
        tokens: of one forward, padding included.
        supervised: of these, scored.
        layers: of the base model.
        hidden: size of a hidden state.
        intermediate: size inside the feed-forward block.
        vocabulary: size of it.
        scores: of one token in one layer, heads times tokens of a row, if the attention keeps them.
        checkpointing: activations are recomputed in the backward pass.
        quantized: of the frozen model's parameters.
        quantized_bytes: per weight of these.
        largest: parameters of the largest quantised layer.
        frozen: parameters of the factors at which adapters start.
        rescaled: outputs of DoRA's layers, for one token, in all layers.
        copies: full weights that are kept in the base's dtype too.
        all_logits: the head is trained in full, or held in parts.
        stage: of ZeRO; FSDP2 is 3.
        processes: that share.
        gathered: parameters of the base model that are whole at once in stage 3.

    Returns:
        What one process holds.
    """
    layer = base_bytes * (7 * hidden + 4 * intermediate) + 8 * hidden + scores * (base_bytes + 4)
    layer += base_bytes * rescaled // layers
    per_token = layers * base_bytes * hidden + layer if checkpointing else layers * layer
    logits = min(supervised, chunk_rows(vocabulary)) * vocabulary * (base_bytes + 8)
    if all_logits:
        logits = supervised * vocabulary * (2 * base_bytes + 12)
    base = int((base_parameters - quantized + largest) * base_bytes + quantized * quantized_bytes)
    state = 12 if stage in (1, 2) else 8
    return Memory(
        base=base // processes + gathered * base_bytes if stage == 3 else base,
        adapters=4 * trainable + 4 * trainable // (processes if stage >= 2 else 1) + 4 * frozen,
        optimizer=state * trainable // (processes if stage >= 1 else 1),
        activations=tokens * per_token + supervised * hidden * 2 * base_bytes + logits + copies * base_bytes,
    )


@dataclass(frozen=True)
class RunPlan:
    """What will be trained.

    Args:
        seeds: of the replicas.
        passes: how many stacks they are trained in, one after the other.
        budget: ``equal`` or ``full``.
        replica: how long each replica trains.
        steps: optimizer steps of each replica.
        batch: rows of each replica in an optimizer step.
        rows: training rows.
        tokens: that each replica sees in training.
        supervised: of these, scored.
        padding: part of the tokens of a forward that is padding.
        trainable: parameters of one replica.
        base_parameters: of the frozen model.
        memory: estimate for one stack.
        memory_alone: estimate for one seed alone.
        model: its name.
        data: its name, with validation and test rows.
        merge: the method.
        dtype: of the base weights.
        adapter: what is trained, for people.
        compile: the backend that compiles the layers.
        controls: those that are trained too, for people.
        processes: that train, each with the memory estimated.
        left_out: what became of rows that are not used as they are, a sentence for each source that has some.
        note: what was asked for and does nothing.
    """

    seeds: Sequence[int]
    passes: int
    budget: str
    replica: ReplicaBudget
    steps: int
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
    processes: int = 1
    left_out: Sequence[str] = ()
    note: str | None = None

    def table(self) -> Table:
        """The plan as a table for the terminal."""
        table = Table(title="The run", title_justify="left", show_header=False)
        n = len(self.seeds)
        epochs = (
            "" if self.replica.epochs is None else f"{_counted(self.replica.epochs, 'epoch')} of {self.rows:,} rows, "
        )
        stacks = "one stack" if self.passes == 1 else f"{self.passes} passes"
        memory = self.memory
        each = "" if self.processes == 1 else f" in each of {self.processes} processes"
        rows = {
            "base model": f"{self.model}, {self.base_parameters / 1e6:,.1f} M parameters, {self.dtype}, frozen",
            "data": self.data,
            "seeds": f"{', '.join(map(str, self.seeds))} in {stacks}",
            "budget": f"{self.budget}: each seed {epochs}{self.steps:,} steps of {self.batch} rows",
            "tokens": (
                f"{self.tokens:,} per seed ({self.supervised:,} of them scored), {n * self.tokens:,} in all; "
                f"{self.padding:.0%} padding beside them"
            ),
            "adapter": self.adapter,
            "trainable": f"{self.trainable:,} parameters per seed, {n * self.trainable:,} in all",
            "memory": (
                f"about {_gib(memory.total)}{each}: base {_gib(memory.base)}, adapters {_gib(memory.adapters)}, "
                f"optimizer {_gib(memory.optimizer)}, activations {_gib(memory.activations)}; "
                "beside Python and its libraries"
            ),
            "merge": self.merge,
            "compiled": self.compile and f"decoder layers in training, by {self.compile}; the first steps take longer",
            "controls": self.controls,
            "note": self.note,
        }
        for name, value in rows.items():
            if value is not None:
                table.add_row(name, value)
        return table


def run_plan(trainer: pl.Trainer, module: SeedLoRAModule, data: Any, ensemble: Any) -> RunPlan:
    """The plan of a run from its parts, without loading the base model's weights.

    Args:
        trainer: its limits and accumulation count.
        module: the model to train.
        data: a data module that is set up: its ``rows``, and a training loader whose sampler knows its own padding.
        ensemble: the callback: seeds, budget, stack size and method.
    """
    n, hparams = len(ensemble.seeds), module.hparams
    share = ensemble.share(trainer)
    loader = data.train_dataloader()
    steps = ensemble.replica_steps(trainer, data)
    rows, sampler = data.rows["train"], loader.sampler
    seen = steps * sampler.rows_per_step
    model = outline(hparams["base_model"])
    stack = min(n, ensemble.stack_size or n)
    memory = memory_of(trainer, module, data)
    return RunPlan(
        seeds=ensemble.seeds,
        passes=math.ceil(n / stack),
        budget=ensemble.budget,
        replica=share,
        steps=steps,
        batch=sampler.rows_per_step,
        rows=len(rows),
        tokens=int(seen * rows.lengths.mean()),
        supervised=int(seen * rows.num_items.mean()),
        padding=sampler.padding(),
        trainable=trainable_parameters(module),
        base_parameters=model.parameters,
        memory=memory(stack),
        memory_alone=memory(1),
        model=hparams["base_model"],
        data=_rows(data),
        merge="; ".join(filter(None, (ensemble.method_name, module.averaged_words))),
        dtype=module.precision_of_base,
        adapter=module.adapter_words,
        compile=hparams["compile"],
        controls=(
            f"trained after the seeds: one seed for {n * steps:,} steps, one of rank {n * hparams['r']} for {steps:,}; "
            f"{(n + 1) * int(seen * rows.lengths.mean()):,} tokens more"
            if ensemble.trains_controls
            else None
        ),
        processes=trainer.world_size,
        left_out=_left_out(data),
        note=ensemble.comparison.nothing_for(n),
    )


def write_cost(file: Path, plan: RunPlan, libraries: Sequence[str] = ()) -> None:
    """Write down what a run is going to do and by which libraries; what an earlier part took is kept.

    Args:
        file: to write.
        plan: of the run.
        libraries: further ones, which decide the data.
    """
    versions = {name: version(name) for name in (*LIBRARIES, *libraries)}
    try:
        before = read_record(file) or {}
    except ValueError as error:
        raise ValueError(f"{error}; without it --resume does not know what the run has cost so far") from None
    taken = {"took": before.get("took", {}), "peak_bytes": before.get("peak_bytes", 0)}
    cost = {
        "plan": asdict(plan),
        "versions": {"python": python_version(), **versions},
        "base": identity(plan.model),
        **taken,
    }
    write_text(file, json.dumps(cost, indent=2) + "\n")


@contextlib.contextmanager
def timed(file: Path, device: torch.device, clock: Any, control: str | None = None) -> Iterator[None]:
    """Add the seconds that a fit takes, phase by phase, to those in a cost file, also when it is interrupted.

    Args:
        file: written by :func:`write_cost`.
        device: whose memory is watched, while seeds are trained.
        clock: the callback that knows the seconds of each phase: ``took``, and ``enter(None)`` to stop it.
        control: the control that is trained; default: the seeds.
    """
    peak = PeakMemory(device)
    try:
        yield
    finally:
        clock.enter(None)
        if (cost := read_record(file)) is not None:
            before = cost["took"].get(control or "seeds", {})
            added = {phase: before.get(phase, 0.0) + seconds for phase, seconds in clock.took.items()}
            cost["took"][control or "seeds"] = {**before, **added}
            if control is None:
                cost["peak_bytes"] = max(cost["peak_bytes"], peak.bytes)
            write_text(file, json.dumps(cost, indent=2) + "\n")


def trainable_parameters(module: SeedLoRAModule) -> int:
    """Parameters of one replica."""
    magnitudes = module.hparams["adapter"] == "dora"
    factors = sum(module.rank(path) * (d + k) + magnitudes * d for path, (d, k) in module.targets.items())
    return factors + sum(module.full_modules.values())


def memory_of(trainer: pl.Trainer, module: SeedLoRAModule, data: Any) -> Callable[[int], Memory]:
    """:func:`memory_estimate` of a step of this module on this data in one process, by the seeds trained at once."""
    rows, sampler, shared = data.rows["train"], data.train_dataloader().sampler, sharding(trainer)
    longest, supervised = int(rows.lengths.max()), data.batch_size * rows.num_items.mean()
    return lambda stack: step_memory(
        module,
        stack,
        tokens=stack * sampler.most_tokens,
        supervised=int(stack * supervised),
        longest=longest,
        shared=shared,
        device=trainer.strategy.root_device,
    )


def step_memory(
    module: SeedLoRAModule,
    stack: int,
    *,
    tokens: int,
    supervised: int,
    longest: int,
    shared: Sharding = ONE_PROCESS,
    device: torch.device | None = None,
) -> Memory:
    """:func:`memory_estimate` of a step of this module.

    Args:
        module: the model to train.
        stack: replicas trained at once.
        tokens: of one forward, padding included.
        supervised: of these, scored.
        longest: tokens of the longest row.
        shared: what the strategy deals out. In stage 3 two decoder layers are whole at once, the one that computes and
            the next, and what is outside of them, the head among it, which then takes all logits at once.
        device: that trains. Default: a GPU, if there is one.
    """
    hparams, model = module.hparams, outline(module.hparams["base_model"])
    config, targets, trainable = model.config, module.targets, trainable_parameters(module)
    per_weight = QUANTIZATIONS[hparams["quantization"]]
    sizes = [d * k for d, k in model.linear.values()] if per_weight else []
    full, body = module.full_modules, sum(d * k for d, k in model.linear.values())
    # What is recomputed is cast again.
    kept = [n for path, n in full.items() if not (hparams["gradient_checkpointing"] and path in model.linear)]
    return memory_estimate(
        base_parameters=model.parameters,
        base_bytes=module.dtype_base.itemsize,
        trainable=stack * trainable,
        tokens=tokens,
        supervised=supervised,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        vocabulary=config.vocab_size,
        scores=attention_scores(module, longest, device),
        checkpointing=hparams["gradient_checkpointing"],
        quantized=sum(sizes),
        quantized_bytes=per_weight or 0,
        largest=max(sizes, default=0),
        frozen=trainable - sum(full.values()) if module.starts_at_weights else 0,
        rescaled=sum(d for d, _ in targets.values()) if hparams["adapter"] == "dora" else 0,
        copies=stack * sum(kept) if module.dtype_base != torch.float32 else 0,
        all_logits=model.head in full or shared.stage == 3,
        stage=shared.stage,
        processes=shared.processes,
        gathered=model.parameters - body + 2 * body // config.num_hidden_layers,
    )


def attention_scores(module: SeedLoRAModule, tokens: int, device: torch.device | None = None) -> int:
    """Scores that attention keeps of one token in one layer, for rows of so many tokens; 0 where none are kept."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if module.dtype_base != torch.bfloat16 or attention(device, tokens) != "eager":
        return 0
    return int(outline(module.hparams["base_model"]).config.num_attention_heads) * tokens


@dataclass(frozen=True)
class Work:
    """Weights that a token passes in training.

    Args:
        body: frozen, in the linear layers.
        head: in front of the vocabulary.
        adapter: trained, of one replica, layers that are trained in full among them.
        head_trained: whether the head is.
    """

    body: int
    head: int
    adapter: int
    head_trained: bool = False

    def operations(self, *, tokens: int, scored: float, recomputed: bool = False) -> float:
        """Floating-point operations of forward and backward: 4 per frozen weight, 6 per trained one.

        Args:
            tokens: of the training.
            scored: of these, those that pass the head.
            recomputed: by gradient checkpointing: 2 more per weight of the layers.
        """
        body, adapter = (6, 8) if recomputed else (4, 6)
        return (
            tokens * (body * self.body + adapter * self.adapter) + scored * (6 if self.head_trained else 4) * self.head
        )


def work(module: Any) -> Work:
    """What a token costs in this module."""
    model = outline(module.hparams["base_model"])
    head = model.config.vocab_size * model.config.hidden_size
    full = module.full_modules
    sizes = {name: d * k for name, (d, k) in model.linear.items() if d != model.config.vocab_size}
    own = sum(size for name, size in sizes.items() if name in full)
    factors = trainable_parameters(module) - sum(full.values())
    return Work(sum(sizes.values()) - own, head, factors + own, model.head in full)


class PeakMemory:
    """The most memory that is held, beside what was held when this was made.

    Args:
        device: a CUDA device, whose allocations are counted, or the CPU: then this process's resident memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.init()  # or there are no statistics to reset, which is an error
        self.forget()
        cuda = device.type == "cuda"
        self._before = torch.cuda.memory_allocated(device) if cuda else _process_memory("VmRSS")

    def forget(self) -> None:
        """Start the peak anew from what is held now."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with contextlib.suppress(OSError):  # Linux forgets the old peak
                Path("/proc/self/clear_refs").write_text("5")

    @property
    def bytes(self) -> int:
        """Since this was made."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self._before
        return _process_memory("VmHWM") - self._before


def _process_memory(field: str) -> int:
    """``VmRSS``, now, or ``VmHWM``, the peak; the peak for both where there is no /proc."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(field))


def fitting_stack(seeds: int, memory: Callable[[int], Memory], available: int) -> int:
    """The most seeds, of those given and at least one, whose estimate is within 80 % of the memory."""
    return max([1, *(n for n in range(1, seeds + 1) if memory(n).total <= 0.8 * available)])


def device_memory(trainer: pl.Trainer) -> int:
    """Bytes of the device that a process of the trainer uses, free or not: the same at every start of a run.

    The processes of one machine share its memory where they train on the CPU.
    """
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // trainer.num_devices


def _rows(data: Any) -> str:
    parts = ", ".join(f"{len(part):,} {split}" for split, part in data.rows.items())
    return "; ".join([f"{type(data).__name__}: {parts}", *_left_out(data)])


def _left_out(data: Any) -> list[str]:
    return [sentence for counts in data.counts.values() if (sentence := counts.sentence())]


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
