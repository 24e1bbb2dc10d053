"""The forward of a training step: the losses of the active replicas over one micro-batch.

Shape legend: ``N`` replicas, ``n`` of them active, ``b`` rows of each, ``T`` tokens; ``M`` rows of the forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, NotRequired, TypedDict

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from seedlora.model.attention import Documents
from seedlora.training.losses import TokenLosses
from seedlora.training.replicas import Replica, ReplicaStates

if TYPE_CHECKING:
    from seedlora.adapters.stack import AdapterStack


class TrainingBatch(TypedDict):
    """Holds a micro-batch of all replicas: a block of rows for each, or of tokens.

    Attributes:
        input_ids: (N, b, T), padded on the right; of joined rows (T,), one replica after the other.
        labels: as :class:`seedlora.training.losses.TokenLosses` takes them, in the same shape.
        num_items: tokens scored of each replica in the whole optimizer step, on all ranks.
        lengths: tokens of each replica's longest row: what T would be if it were trained alone; not of joined rows.
        position_ids: of packed and joined rows, which hold several samples.
        rows: of packed rows: what b would be if the replica were trained alone.
        documents: of joined rows: per replica, the tokens of each of its samples.
    """

    input_ids: Int[Tensor, "*N_b T"]
    labels: Int[Tensor, "*N_b T"]
    num_items: Int[Tensor, " N"]
    lengths: NotRequired[Sequence[int]]
    position_ids: NotRequired[Int[Tensor, "*N_b T"]]
    rows: NotRequired[Sequence[int]]
    documents: NotRequired[Sequence[Sequence[int]]]


class ForwardInputs(NamedTuple):
    """Holds the active replicas' part of a micro-batch, as :class:`seedlora.training.losses.TokenLosses` takes it.

    Attributes:
        input_ids: of the forward.
        labels: likewise.
        position_ids: likewise; None where each row holds one sample.
        documents: of joined rows.
        blocks: tokens of each replica, padding included.
    """

    input_ids: Int[Tensor, "M T"]
    labels: Int[Tensor, "M T"]
    position_ids: Int[Tensor, "M T"] | None
    documents: Documents | None
    blocks: Sequence[int]


class MicroBatchLosses(NamedTuple):
    """Holds the losses of the active replicas in one forward.

    Attributes:
        replicas: the active ones, in their order.
        sums: of each, over its tokens on this rank; with the graph for the backward pass.
        shown: on the CPU, of each the summed loss and the number of tokens, on all ranks.
        size: tokens of the forward, padding included.
    """

    replicas: Sequence[Replica]
    sums: Float[Tensor, " n"]
    shown: Float[Tensor, "2 n"]
    size: int

    def broken(self, stack: AdapterStack) -> list[str]:
        """Return the replicas that are at fault for losses that are not finite. All ranks must call it."""
        finite = self.shown[0].isfinite().tolist()
        names = [replica.name for replica, ok in zip(self.replicas, finite, strict=True) if not ok]
        # Zero times infinity: weights that are not finite spoil every row, and only their own replica is at fault.
        return [name for name in names if not stack.is_finite(name)] or names


class ForwardSize(NamedTuple):
    """Counts the tokens of a forward on one rank, padding included, and those that a rank scored, on average."""

    tokens: int
    scored: float


def micro_batch_losses(
    batch: TrainingBatch,
    replicas: ReplicaStates,
    stack: AdapterStack,
    token_losses: TokenLosses,
    *,
    dropout_key: Sequence[int] | None,
    are_one: bool = False,
    reduce: Callable[[Tensor], Tensor],
) -> MicroBatchLosses:
    """Compute the losses of the active replicas, whose rows alone are in the forward. All ranks must call it.

    Args:
        batch: of all replicas.
        replicas: in the order of the batch.
        stack: that holds them.
        token_losses: under what the stack is routed to.
        dropout_key: what the dropout depends on beside the replica's seed: epoch, batch, rank. ``None`` switches it
            off.
        are_one: whether the replicas are one, whose rows all draw masks of their own: by the seeds of the rows' orders,
            as that of the dropout is the same.
        reduce: sums a tensor over the ranks.
    """
    active, positions = replicas.active, replicas.active_positions
    seeds = [replica.order_seed if are_one else replica.init_seed for replica in active]
    inputs = (_joined_inputs if "documents" in batch else _row_inputs)(batch, positions)
    stack.route(
        [replica.name for replica in active],
        lengths=[batch["lengths"][i] for i in positions] if "lengths" in batch else (),
        rows=[batch["rows"][i] for i in positions] if "rows" in batch else (),
        tokens=() if inputs.documents is None else inputs.blocks,
        dropout_keys=None if dropout_key is None else [(seed, *dropout_key) for seed in seeds],
    )
    losses, _, keep, _ = token_losses(*inputs[:4], greedy=False)
    sums, tokens = _block_sums(losses, inputs.blocks), _block_sums(keep, inputs.blocks)
    # On the CPU from here on, where looking at a number and logging it does not wait for the device once more.
    shown = reduce(torch.stack([sums.detach(), tokens.to(sums.dtype)])).cpu()
    return MicroBatchLosses(active, sums, shown, keep.numel())


def _row_inputs(batch: TrainingBatch, positions: Sequence[int]) -> ForwardInputs:
    """Return the blocks of rows at these positions."""

    def rows_of(tensor: Tensor) -> Tensor:
        return (tensor if len(positions) == len(tensor) else tensor[positions]).flatten(0, 1)

    found = [rows_of(batch[key]) for key in ("input_ids", "labels")]
    packed = rows_of(batch["position_ids"]) if "position_ids" in batch else None
    block = found[0].numel() // len(positions)
    return ForwardInputs(found[0], found[1], packed, None, (block,) * len(positions))


def _joined_inputs(batch: TrainingBatch, positions: Sequence[int]) -> ForwardInputs:
    """Return the blocks of tokens at these positions, as one row."""
    documents = batch["documents"]
    sizes = [sum(each) for each in documents]

    def row_of(tensor: Tensor) -> Tensor:
        if len(positions) < len(sizes):
            blocks = tensor.split(sizes)
            tensor = torch.cat([blocks[i] for i in positions])
        return tensor[None]

    ids = row_of(batch["input_ids"])
    lengths = tuple(length for i in positions for length in documents[i])
    blocks = [sizes[i] for i in positions]
    return ForwardInputs(
        ids, row_of(batch["labels"]), row_of(batch["position_ids"]), Documents(lengths, ids.device), blocks
    )


def _block_sums(values: Tensor, blocks: Sequence[int]) -> Tensor:
    """Sum up values by token over the tokens of each replica."""
    if len(set(blocks)) == 1:
        return values.view(len(blocks), -1).sum(1)
    return torch.stack([block.sum() for block in values.flatten().split(list(blocks))])


def no_loss(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return 0, with a gradient of 0 for every one of these parameters: DDP waits for all."""
    return torch.stack([(parameter.nan_to_num(0, 0, 0) * 0).sum() for parameter in parameters]).sum()
