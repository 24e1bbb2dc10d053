"""Read, split and share out weights of which each rank holds a part."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from seedlora.distributed.deepspeed_internals import destroy_engine, is_partitioned_parameter
from seedlora.distributed.strategies import FSDP2Strategy
from seedlora.utils.transformers_internals import unit_layer_classes

if TYPE_CHECKING:
    from peft import PeftModel


def shard_model(model: PeftModel, trainer: pl.Trainer) -> None:
    """Split a PEFT model's weights over the ranks under FSDP2, one decoder layer at a time; else do nothing.

    A layer's weights, the adapters among them, are whole while it computes. A model is split once.
    """
    if not isinstance(trainer.strategy, FSDP2Strategy) or is_sharded(model):
        return
    from torch.distributed.fsdp import fully_shard

    mesh = trainer.strategy.device_mesh["data_parallel"]
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def decoder_layers(model: PeftModel) -> list[torch.nn.Module]:
    """Return the decoder layers of a PEFT model, in their order: those that its family names as units."""
    names = unit_layer_classes(model.get_base_model())
    return [layer for layer in model.modules() if type(layer).__name__ in names]


def is_sharded(model: torch.nn.Module) -> bool:
    """Return whether :func:`shard_model` has split the model, whose layers can then not be split again."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def is_partitioned(model: torch.nn.Module) -> bool:
    """Return whether ZeRO-3 has dealt the model's weights out: it takes other adapters only if they need no weights."""
    return any(map(is_partitioned_parameter, model.parameters()))


def release_engine(trainer: pl.Trainer) -> None:
    """Take DeepSpeed's hooks and buffers off the module after a fit: the next fit makes an engine of its own."""
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        destroy_engine(trainer.model)


def broadcast_from_rank0(trainer: pl.Trainer, tensor: Tensor) -> Tensor:
    """Give all ranks the first rank's tensor, where others pass one of its shape and dtype. All ranks must call it."""
    if trainer.world_size == 1:
        return tensor
    shared = tensor.to(trainer.strategy.root_device)
    torch.distributed.broadcast(shared, src=0)
    return shared.to(tensor.device)


def gather_parameter(parameter: Tensor) -> Tensor:
    """Return all values of a parameter, detached and copied, even if each rank holds a part. All ranks must call it."""
    if is_partitioned_parameter(parameter):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    if isinstance(parameter, DTensor):
        full: Tensor = parameter.full_tensor()
        return full.detach()
    return parameter.detach().clone()
