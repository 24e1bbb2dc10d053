"""Choose whether the training rows are packed."""

from __future__ import annotations

from typing import NamedTuple

from seedlora.datamodules.rows import TokenRows
from seedlora.datamodules.sampler import ReplicaSampler

#: As ``pack_tokens``: as it is fastest.
AUTO = "auto"
#: Part of a forward that may be padding before rows are joined. `benchmarks/packing.py` measures what it costs.
LITTLE_PADDING = 0.08
#: For which the padding is looked at, whoever is trained: a replica must not be packed alone and unpacked in a stack.
_SEEDS = (0, 1, 2)


class Packing(NamedTuple):
    """Say how the training rows share a forward, and why.

    Attributes:
        pack_tokens: the most tokens of a pack; None if there are none.
        joined: all rows of a forward follow each other in one row, and nothing is padded.
        why: for people.
    """

    pack_tokens: int | None
    joined: bool
    why: str


def choose_packing(
    rows: TokenRows, pack_tokens: int | str | None, *, batch_size: int, slots: int, refused: str | None
) -> Packing:
    """Choose by what is asked for, by the model, and by how much padding there would be.

    Args:
        rows: the training rows.
        pack_tokens: what is asked for: :data:`AUTO`, the most tokens of a pack, or ``None``.
        batch_size: rows of one replica in one forward on one rank.
        slots: micro-batches of an optimizer step, on all ranks together.
        refused: why the model cannot take joined rows; None if it can.
    """
    if isinstance(pack_tokens, int):
        return Packing(pack_tokens, joined=False, why=f"packed into rows of at most {pack_tokens:,} tokens, as asked")
    if pack_tokens is None:
        return Packing(None, joined=False, why="each row is on its own, as asked")
    if refused is not None:
        return Packing(None, joined=False, why=f"each row is on its own: {refused}")
    if len(rows) < batch_size * slots:
        return Packing(None, joined=False, why="each row is on its own: they do not fill a step")
    unpacked = ReplicaSampler(rows, seeds=_SEEDS, batch_size=batch_size, accumulate=slots).padding()
    if unpacked <= LITTLE_PADDING:
        return Packing(None, joined=False, why=f"each row is on its own, which pads {unpacked:.0%} of a forward")
    return Packing(None, joined=True, why=f"rows follow each other without padding, which would be {unpacked:.0%}")
