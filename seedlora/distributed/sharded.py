"""Weights that several ranks hold in parts."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from seedlora.distributed.strategies import FSDP2Strategy


def shard(model: Any, trainer: pl.Trainer) -> None:
    """Under FSDP2, split a PEFT model's weights over the ranks, one decoder layer at a time; else do nothing.

    A layer's weights, the adapters among them, are whole while it computes. A model is split once.
    """
    if not isinstance(trainer.strategy, FSDP2Strategy) or is_sharded(model):
        return
    from torch.distributed.fsdp import fully_shard

    mesh = trainer.strategy.device_mesh["data_parallel"]
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def decoder_layers(model: Any) -> list[torch.nn.Module]:
    """The layers of a PEFT model that its family names as units, in their order."""
    names = set(model.get_base_model()._no_split_modules or ())
    return [layer for layer in model.modules() if type(layer).__name__ in names]


def is_sharded(model: Any) -> bool:
    """Whether :func:`shard` has split the model: its layers can then not be split anew for other adapters."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def is_partitioned(model: Any) -> bool:
    """Whether ZeRO-3 has dealt the model's weights out: other adapters can be put on it, if they need no weights."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def release(trainer: pl.Trainer) -> None:
    """Take DeepSpeed's hooks and buffers off the module after a fit: the next one makes an engine of its own."""
    engine: Any = trainer.model
    if isinstance(trainer.strategy, DeepSpeedStrategy) and engine is not None and hasattr(engine, "destroy"):
        engine.destroy()


def broadcast_from_rank0(trainer: pl.Trainer, tensor: Tensor) -> Tensor:
    """The first rank's tensor on all ranks, where others give one of its shape and dtype. All ranks must call it."""
    if trainer.world_size == 1:
        return tensor
    shared = tensor.to(trainer.strategy.root_device)
    torch.distributed.broadcast(shared, src=0)
    return shared.to(tensor.device)


def whole(parameter: Tensor) -> Tensor:
    """All values of a parameter, also where each rank holds a part: a detached copy. All ranks must call it."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    if isinstance(parameter, DTensor):
        full: Tensor = parameter.full_tensor()
        return full.detach()
    return parameter.detach().clone()
