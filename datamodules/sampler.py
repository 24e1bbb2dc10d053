"""Which rows a replica sees: a pure function of (seed, epoch, position, rank)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import DataLoader, Sampler

from datamodules.rows import MicroBatch, TokenRows


class ReplicaSampler(Sampler[MicroBatch]):
    """Micro-batches for a stack of replicas, each in the order of its own seed.

    Epoch ``e`` of seed ``s`` is one permutation of the rows, cut into optimizer steps of
    ``batch_size * accumulate * world_size`` rows. Within a step the rows are sorted by length and dealt out: which
    micro-batch and which rank a row falls into changes neither the step's gradient nor its normalisation, and
    micro-batches of one length are padded least. Rows that do not fill a last step are left out of that epoch.

    A replica's order does not depend on what it is stacked with; the set of rows of a step depends on
    ``accumulate * world_size`` only through their product.

    Args:
        rows: the training rows.
        seeds: one per replica.
        batch_size: rows of one replica in one forward on one rank.
        accumulate: micro-batches of one optimizer step.
        rank: of this process, of ``world_size``.
        world_size: processes that share a step.
        epoch: where to begin; Lightning moves it on with :meth:`set_epoch`.

    Raises:
        ValueError: if the rows do not fill one step.
    """

    def __init__(
        self,
        rows: TokenRows,
        *,
        seeds: Sequence[int],
        batch_size: int,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
        epoch: int = 0,
    ) -> None:
        self.lengths, self.num_items = rows.lengths, rows.num_items
        self.seeds = tuple(seeds)
        self.batch_size, self.accumulate = batch_size, accumulate
        self.rank, self.world_size = rank, world_size
        self.epoch, self.start = epoch, 0
        self.steps = len(rows) // self.rows_per_step
        if not self.steps:
            raise ValueError(
                f"{len(rows)} training rows do not fill one optimizer step of {self.rows_per_step} "
                f"(batch_size {batch_size} x accumulate_grad_batches {accumulate} x {world_size} processes)"
            )

    @property
    def rows_per_step(self) -> int:
        """Rows of one replica in one optimizer step."""
        return self.batch_size * self.accumulate * self.world_size

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; a position set for another epoch is forgotten."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def order(self, seed: int, step: int) -> np.ndarray:
        """The rows of one optimizer step of one replica, sorted by length (ties in the order drawn)."""
        permutation = np.random.default_rng([seed, self.epoch]).permutation(len(self.lengths))
        rows = permutation[step * self.rows_per_step : (step + 1) * self.rows_per_step]
        return rows[np.argsort(self.lengths[rows], kind="stable")]

    def __iter__(self) -> Iterator[MicroBatch]:
        start, self.start = self.start, 0
        for step in range(start // self.accumulate, self.steps):
            orders = [self.order(seed, step) for seed in self.seeds]
            num_items = tuple(int(self.num_items[rows].sum()) for rows in orders)
            for micro in range(self.accumulate):
                if step * self.accumulate + micro < start:
                    continue
                first = (micro * self.world_size + self.rank) * self.batch_size
                part = slice(first, first + self.batch_size)
                yield MicroBatch(tuple(tuple(rows[part].tolist()) for rows in orders), num_items)


class ReplicaLoader(DataLoader[dict[str, object]]):
    """A DataLoader whose position is part of Lightning's checkpoint, so that a resumed epoch goes on where it was."""

    def __iter__(self) -> Iterator[dict[str, object]]:  # type: ignore[override]
        sampler = self.sampler
        assert isinstance(sampler, ReplicaSampler)
        self._position = sampler.start
        for batch in super().__iter__():
            self._position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch and number of micro-batches handed out in it."""
        assert isinstance(self.sampler, ReplicaSampler)
        return {"epoch": self.sampler.epoch, "position": getattr(self, "_position", 0)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the micro-batches of :meth:`state_dict`, if the epoch is the same."""
        assert isinstance(self.sampler, ReplicaSampler)
        self.sampler.epoch, self.sampler.start = state["epoch"], state["position"]
