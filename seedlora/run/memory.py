"""Estimate the memory that a training step needs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch

from seedlora.distributed.strategies import ONE_PROCESS, Sharding, sharding_of
from seedlora.model.quantization import QUANTIZATIONS
from seedlora.model.recomputation import NOTHING, SELECTIVE, WHOLE_LAYERS
from seedlora.run.activations import activation_bytes, attention_bytes, decoder_shape
from seedlora.run.ensemble import Ensemble
from seedlora.run.ensemble_options import AUTO
from seedlora.run.stack_data import PlannedData, StackDataModule
from seedlora.training.replicas import Replica
from seedlora.utils.options import name_option

if TYPE_CHECKING:
    from seedlora.training.model_options import ModelOptions

#: Seeds whose orders of rows are looked at for the largest forward.
MOST_ORDERS = 8
#: Part of a device's memory that a stack may take: the estimate is within a fifth, and allocators leave holes.
PART_USED = 0.8
#: Bytes that products and threads of a CPU take for themselves.
CPU_BUFFERS = 64 * 2**20
#: What a CPU's allocator holds for each byte in use, by what is recomputed: arrays of many sizes come and go, and leave
#: holes, which count most where little is kept. Measured, with glibc's, by benchmarks/memory.py.
CPU_HOLES = {NOTHING: 1.4, SELECTIVE: 1.6, WHOLE_LAYERS: 2.6}
#: The same where joined rows keep everything: their attention goes in blocks of few sizes.
CPU_HOLES_JOINED = 1.15


@dataclass(frozen=True)
class Memory:
    """Hold estimated bytes by part."""

    base: int
    adapters: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Return the bytes of all parts together."""
        return self.base + self.adapters + self.optimizer + self.activations


def memory_estimate(
    *,
    base_parameters: int,
    base_bytes: int,
    trainable: int,
    activations: int,
    quantized: int = 0,
    quantized_bytes: float = 0,
    largest: int = 0,
    frozen: int = 0,
    copies: int = 0,
    stage: int = 0,
    processes: int = 1,
    gathered: int = 0,
    state_bytes: int = 8,
) -> Memory:
    """Estimate the bytes that a training step needs, beside Python and its libraries.

    ``base_parameters * base_bytes`` for the frozen weights; 4 bytes for an adapter's weight and 4 for its gradient; 8
    for AdamW's two moments, or what another optimizer keeps. Modules that are trained in full are trained parameters
    like an adapter's. What is trained is kept once more in the base's dtype for the backward pass.

    A quantised weight takes ``quantized_bytes``, and the largest layer is whole while it is multiplied.

    Of several processes each holds its part: of AdamW's moments from ZeRO's stage 1, where DeepSpeed keeps another 4
    bytes for its part of the trained weights (not in stage 3, where they are the weights), of the gradients from stage
    2, of the base model in stage 3 and under FSDP2, and there ``gathered`` parameters whole. The trained weights are
    counted whole: ZeRO-3 keeps parameters whole that are as small as an adapter's.

    Args:
        base_parameters: of the frozen model.
        base_bytes: per weight of it.
        trainable: adapter parameters of the replicas trained at once.
        activations: :func:`seedlora.run.activations.activation_bytes`, and what else passes.
        quantized: of the frozen model's parameters.
        quantized_bytes: per weight of these.
        largest: parameters of the largest quantised layer.
        frozen: parameters of the factors at which adapters start.
        copies: trained weights that are kept in the base's dtype too.
        stage: of ZeRO; FSDP2 is 3.
        processes: that share.
        gathered: parameters of the base model that are whole at once in stage 3.
        state_bytes: that the optimizer keeps of each trained weight.

    Returns:
        What one process holds.
    """
    base = int((base_parameters - quantized + largest) * base_bytes + quantized * quantized_bytes)
    state = state_bytes + (4 if stage in (1, 2) else 0)
    return Memory(
        base=base // processes + gathered * base_bytes if stage == 3 else base,
        adapters=4 * trainable + 4 * trainable // (processes if stage >= 2 else 1) + 4 * frozen,
        optimizer=state * trainable // (processes if stage >= 1 else 1),
        activations=activations + copies * base_bytes,
    )


def trainable_parameters(options: ModelOptions) -> int:
    """Count the parameters of one replica."""
    magnitudes = options.adapter == "dora"
    factors = sum(options.rank(path) * (d + k) + magnitudes * d for path, (d, k) in options.targets.items())
    return factors + sum(options.full_modules.values())


def memory_of(
    trainer: pl.Trainer, options: ModelOptions, data: PlannedData, replicas: Iterable[Replica] = ()
) -> Callable[[int], Memory]:
    """Return a function of the replicas trained at once: :func:`memory_estimate` of their largest step in one process.

    Args:
        trainer: of the fit.
        options: of the model to train.
        data: the data module, set up.
        replicas: all of the run, whose sizes may differ: the largest count. Default: all are of the module's options.
    """
    replicas = tuple(replicas)
    sizes = sorted((trainable_parameters(options.of_replica(replica.options)) for replica in replicas), reverse=True)
    orders = tuple(dict.fromkeys(replica.order_seed for replica in replicas))[:MOST_ORDERS] or data.seeds
    forwards, shared = data.train_dataloader().sampler.largest_forwards(orders), sharding_of(trainer)

    def memory(stack: int) -> Memory:
        return max(
            (
                step_memory(
                    options,
                    stack,
                    tokens=stack * forward.rows * forward.length,
                    supervised=stack * forward.scored,
                    longest=forward.length,
                    masked=forward.masked,
                    joined=forward.joined,
                    shared=shared,
                    device=trainer.strategy.root_device,
                    trainable=sum(sizes[:stack]) if sizes else None,
                )
                for forward in forwards
            ),
            key=lambda found: found.total,
        )

    return memory


def step_memory(
    options: ModelOptions,
    stack: int,
    *,
    tokens: int,
    supervised: int,
    longest: int,
    masked: bool = False,
    joined: bool = False,
    shared: Sharding = ONE_PROCESS,
    device: torch.device | None = None,
    trainable: int | None = None,
) -> Memory:
    """Return :func:`memory_estimate` of a step of this model.

    Args:
        options: of the model to train.
        stack: replicas trained at once.
        tokens: of one forward, padding included.
        supervised: of these, scored.
        longest: tokens of the longest row.
        masked: rows hold several samples, which a mask tells apart.
        joined: the one row holds all samples, which attention takes one by one and without scores.
        shared: what the strategy deals out. In stage 3 two decoder layers are whole at once, the one that computes and
            the next, and what is outside of them, the head among it, which then takes all logits at once.
        device: that trains. Default: a GPU, if there is one.
        trainable: parameters of all replicas of the stack. Default: those of as many with the options of the model.
    """
    model, one = options.outline, trainable_parameters(options)
    shape, width = decoder_shape(options), options.base_dtype.itemsize
    per_weight = QUANTIZATIONS[options.quantization]
    sizes = [d * k for d, k in model.linear.values()] if per_weight else []
    full, body = options.full_modules, sum(d * k for d, k in model.linear.values())
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ranks = sum(options.rank(path) for path in options.targets) + options.r * len(options.targets) * (
        options.starts_at_weights
    )
    activations = activation_bytes(
        shape,
        attention_bytes(options, longest, masked=masked, joined=joined, device=device),
        tokens=tokens,
        supervised=supervised,
        width=width,
        recomputed=options.gradient_checkpointing,
        columns=stack * ranks // shape.layers,
        rescaled=sum(d for d, _ in options.targets.values()) // shape.layers if options.adapter == "dora" else 0,
        all_logits=model.head in full or shared.stage == 3,
    )
    if device.type == "cpu":
        recomputed = options.gradient_checkpointing
        holes = CPU_HOLES_JOINED if joined and recomputed == NOTHING else CPU_HOLES[recomputed]
        activations = int(holes * activations) + CPU_BUFFERS
    # What is recomputed is cast again.
    kept = options.gradient_checkpointing == NOTHING
    copied = sum(n for path, n in full.items() if kept or path not in model.linear)
    copied = copied if options.base_dtype != torch.float32 else 0
    return memory_estimate(
        base_parameters=model.parameters,
        base_bytes=width,
        trainable=stack * one if trainable is None else trainable,
        activations=activations,
        quantized=sum(sizes),
        quantized_bytes=per_weight or 0,
        largest=max(sizes, default=0),
        frozen=one - sum(full.values()) if options.starts_at_weights else 0,
        copies=stack * (copied + kept * (one - sum(full.values()))),
        stage=shared.stage,
        processes=shared.processes,
        gathered=model.parameters - body + 2 * body // shape.layers,
        state_bytes=options.optimizer_choice.traits.state_bytes,
    )


def choose_stack_size(ensemble: Ensemble, trainer: pl.Trainer, options: ModelOptions, data: StackDataModule) -> None:
    """Decide the stack size of an ensemble where its options leave it open; whole models go one by one.

    A stack of them would take their memory together and no less time: they share no product. And so do replicas of an
    optimizer that looks at several tensors at once.

    Args:
        ensemble: whose :attr:`~seedlora.run.ensemble.Ensemble.stack_size` is set, once.
        trainer: of the fit.
        options: of the model to train.
        data: the data module, set up.

    Raises:
        ValueError: if the memory is to decide and the data module does not know what its batches take.
    """
    if ensemble.stack_size is not None:
        return
    if not options.optimizer_choice.traits.is_per_tensor:
        ensemble.stack_size = 1
    elif ensemble.options.stack_size == AUTO:
        if not isinstance(data, PlannedData):
            raise ValueError(
                f"{name_option('ensemble.stack_size')} {AUTO} needs a data module with `rows`, `counts` and "
                "`batch_size`, got "
                f"{type(data).__name__}; give a number"
            )
        memory = memory_of(trainer, options, data, ensemble.replicas)
        ensemble.stack_size = fitting_stack(len(ensemble.replicas), memory, device_memory(trainer))
    elif options.is_full_finetuning:
        ensemble.stack_size = 1


def fitting_stack(seeds: int, memory: Callable[[int], Memory], available: int) -> int:
    """Return the most seeds, of those given and at least one, whose estimate is within 80 % of the memory."""
    return max([1, *(n for n in range(1, seeds + 1) if memory(n).total <= PART_USED * available)])


def device_memory(trainer: pl.Trainer) -> int:
    """Return the bytes of the device that a process of the trainer uses, free or not: the same at every start of a run.

    The processes of one machine share its memory where they train on the CPU.
    """
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // trainer.num_devices


def gib(size: int) -> str:
    """Write a size in GiB."""
    return f"{size / 2**30:.2f} GiB"
