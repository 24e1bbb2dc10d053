"""Estimate the memory that a training step needs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch

from seedlora.distributed.strategies import ONE_PROCESS, Sharding, sharding_of
from seedlora.model.head_losses import chunk_rows
from seedlora.model.loading import attention_kernel
from seedlora.model.outline import outline
from seedlora.model.quantization import QUANTIZATIONS

if TYPE_CHECKING:
    from seedlora.training.module import SeedLoRAModule


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
    hidden states; for those of one chunk (:func:`seedlora.model.head_losses.chunk_rows`) the logits in the model's
    dtype and twice in float32. Gradient checkpointing keeps ``base_bytes * hidden`` per token and layer, and recomputes
    one layer at a time. A model family that scales or caps its logits takes all of them at once, which is more.

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


def trainable_parameters(module: SeedLoRAModule) -> int:
    """Parameters of one replica."""
    magnitudes = module.hparams["adapter"] == "dora"
    factors = sum(module.rank(path) * (d + k) + magnitudes * d for path, (d, k) in module.targets.items())
    return factors + sum(module.full_modules.values())


def memory_of(trainer: pl.Trainer, module: SeedLoRAModule, data: Any) -> Callable[[int], Memory]:
    """:func:`memory_estimate` of a step of this module on this data in one process, by the seeds trained at once."""
    rows, sampler, shared = data.rows["train"], data.train_dataloader().sampler, sharding_of(trainer)
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
    if module.dtype_base != torch.bfloat16 or attention_kernel(device, tokens) != "eager":
        return 0
    return int(outline(module.hparams["base_model"]).config.num_attention_heads) * tokens


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


def gib(size: int) -> str:
    """Write a size in GiB."""
    return f"{size / 2**30:.2f} GiB"
