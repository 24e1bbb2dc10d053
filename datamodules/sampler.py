"""Choose which rows a replica sees: a pure function of (seed, epoch, position, rank)."""

from __future__ import annotations

import copy
import heapq
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Sampler

from seedlora.datamodules.rows import MicroBatch, TokenRows
from seedlora.utils.options import name_option

#: Optimizer steps that are looked at for what is said of all.
_LOOKED_AT = 50


class ForwardShape(NamedTuple):
    """Hold the size of one replica's part of a forward.

    Attributes:
        rows: of it.
        length: tokens of each, padding included.
        scored: of its tokens.
        masked: the rows hold several samples, which attention tells apart by a mask.
        joined: its one row holds all samples, which attention takes one by one.
    """

    rows: int
    length: int
    scored: int
    masked: bool
    joined: bool = False

    @property
    def tokens(self) -> int:
        """Return its tokens, padding included."""
        return self.rows * self.length


class Growth(NamedTuple):
    """Say from which optimizer steps of a fit on each replica has several times its rows in a step.

    Attributes:
        since: optimizer steps of the fit, ascending.
        factors: how many times the rows, from each of these on.
        steps_per_epoch: of the fit.
    """

    since: Sequence[int]
    factors: Sequence[int]
    steps_per_epoch: int

    def units(self, steps: int) -> int:
        """Count so many optimizer steps from the start, one of k times the rows as k.

        >>> Growth(since=[3, 6], factors=[2, 4], steps_per_epoch=12).units(8)
        17
        """
        ends = [*self.since[1:], steps]
        spans = [max(min(steps, end) - begin, 0) for begin, end in zip(self.since, ends, strict=True)]
        return steps + sum((factor - 1) * span for factor, span in zip(self.factors, spans, strict=True))


class ReplicaSampler(Sampler[MicroBatch]):
    """Micro-batches for a stack of replicas, each in the order of its own seed.

    Epoch ``e`` of seed ``s`` is one permutation of the rows, cut into optimizer steps of
    ``batch_size * accumulate * world_size`` rows. Within a step the rows are sorted by length and dealt out: which
    micro-batch and which rank a row falls into changes neither the step's gradient nor its normalisation, and
    micro-batches of one length are padded least. Rows that do not fill a last step are left out of that epoch.

    With ``pack_tokens`` the rows of a step are instead put one after the other into packs of nearly equal length (the
    longest first, each into the pack that is shortest so far), as few packs per micro-batch as hold them. ``joined``
    puts all rows of a micro-batch into one row, and deals those of a step so that micro-batches have nearly as many
    tokens.

    Where the rows of a step grow, an epoch may need more rows than there are: a further permutation follows the first.

    A replica's order does not depend on what it is stacked with; the set of rows of a step depends on
    ``accumulate * world_size`` only through their product.

    Args:
        rows: the training rows.
        seeds: one per replica.
        batch_size: rows of one replica in one forward on one rank.
        accumulate: micro-batches of one optimizer step.
        pack_tokens: the most tokens of a pack; ``None`` packs nothing.
        joined: see above; ``pack_tokens`` is not asked then.
        rank: of this process, of ``world_size``.
        world_size: processes that share a step.
        epoch: where to begin; Lightning moves it on with :meth:`set_epoch`.
        growth: when the rows of a step become more; ``None``: never.

    Raises:
        ValueError: if the rows do not fill one step.
    """

    def __init__(
        self,
        rows: TokenRows,
        *,
        seeds: Sequence[int],
        batch_size: int,
        pack_tokens: int | None = None,
        joined: bool = False,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
        epoch: int = 0,
        growth: Growth | None = None,
    ) -> None:
        self.lengths, self.num_items = rows.lengths, rows.num_items
        self.seeds = tuple(seeds)
        self.batch_size, self.accumulate = batch_size, accumulate
        self.pack_tokens, self.joined = pack_tokens, joined
        self.rank, self.world_size = rank, world_size
        self.epoch, self.start = epoch, 0
        self.growth = growth
        self._permutations: dict[tuple[int, int, int], np.ndarray] = {}
        self.steps = len(rows) // self.rows_per_step
        if not self.steps:
            raise ValueError(
                f"{len(rows)} training rows do not fill one optimizer step of {self.rows_per_step} "
                f"(batch_size {batch_size} x accumulate_grad_batches {accumulate} x {world_size} processes); "
                f"lower {name_option('data.batch_size')} or give more rows"
            )

    @property
    def rows_per_step(self) -> int:
        """Return the rows of one replica in one optimizer step, before they grow."""
        return self.batch_size * self.accumulate * self.world_size

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; a position set for another epoch is forgotten."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def order(self, seed: int, step: int) -> np.ndarray:
        """Return the rows of one optimizer step of one replica, sorted by length (ties in the order drawn)."""
        begin, end = (self._rows_before(self.epoch, each) for each in (step, step + 1))
        rows = self._drawn(seed, self.epoch, begin, end)
        return rows[np.argsort(self.lengths[rows], kind="stable")]

    def _rows_before(self, epoch: int, step: int) -> int:
        """Return how many rows of an epoch a replica has seen before one of its optimizer steps."""
        if self.growth is None:
            return step * self.rows_per_step
        first = epoch * self.growth.steps_per_epoch
        return (self.growth.units(first + step) - self.growth.units(first)) * self.rows_per_step

    def _drawn(self, seed: int, epoch: int, begin: int, end: int) -> np.ndarray:
        """Return a part of the rows of an epoch in the order of a seed: one permutation, and what follows it."""
        total = len(self.lengths)
        parts = []
        for turn in range(begin // total, -(-end // total)):
            permutation = self._permutation(seed, epoch, turn)
            parts.append(permutation[max(begin - turn * total, 0) : end - turn * total])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def seen(self, seed: int, steps: int, *, steps_per_epoch: int) -> tuple[int, int]:
        """Count the tokens that a replica has seen after so many optimizer steps from the start, and those that were
        scored.

        Costs one permutation per epoch.
        """
        tokens = scored = 0
        for epoch in range(-(-steps // steps_per_epoch)):
            taken = self._rows_before(epoch, min(steps - epoch * steps_per_epoch, steps_per_epoch))
            rows = self._drawn(seed, epoch, 0, taken)
            tokens += int(self.lengths[rows].sum())
            scored += int(self.num_items[rows].sum())
        return tokens, scored

    def _permutation(self, seed: int, epoch: int, turn: int) -> np.ndarray:
        """Return the rows in the order of a seed, in an epoch for the first time or again; those in use are kept."""
        if (key := (seed, epoch, turn)) not in self._permutations:
            others = {kept: drawn for kept, drawn in self._permutations.items() if kept[0] != seed}
            further = [turn] if turn else []
            drawn = np.random.default_rng([seed, epoch, *further]).permutation(len(self.lengths))
            self._permutations = {**others, key: drawn}
        return self._permutations[key]

    def _packs_per_micro_batch(self, rows: int) -> int:
        """Return how many packs of one replica a micro-batch of so many rows has: those of rows of mean length, and a
        tenth, so that it seldom differs.

        A step whose rows do not fit takes more.
        """
        assert self.pack_tokens is not None
        return min(rows, math.ceil(1.1 * rows * self.lengths.mean() / self.pack_tokens))

    def largest_forwards(self, seeds: Sequence[int], *, steps: int = 32) -> list[ForwardShape]:
        """Return the largest parts that a replica of a stack of these seeds has in a forward of this epoch.

        Looked at are the optimizer steps with the longest row and those in which a replica has the most tokens, on all
        ranks. The stack pads to the largest of its replicas.

        Args:
            seeds: of the replicas.
            steps: how many of each kind.

        Returns:
            The largest by tokens, and the one with the longest rows.
        """
        whole = copy.copy(self)
        # Rows grow where replicas leave, and then a forward has as many as before.
        whole.growth = None
        # What all ranks see in a step is what one sees that accumulates over all of them.
        whole.accumulate, whole.world_size, whole.rank = self.accumulate * self.world_size, 1, 0
        whole.seeds, found = tuple(seeds), []
        drawn = [self._drawn(seed, self.epoch, 0, self.steps * self.rows_per_step) for seed in seeds]
        lengths = self.lengths[np.stack(drawn)].reshape(len(seeds), self.steps, -1)
        for measure in (lengths.sum(2), lengths.max(2)):
            for step in np.argsort(-measure.max(0), kind="stable")[:steps].tolist():
                for micro in whole.micro_batches(step):
                    sizes = [[int(self.lengths[group].sum()) for group in groups] for groups in micro.groups()]
                    scored = sum(int(self.num_items[list(rows)].sum()) for rows in micro.rows)
                    scored = -(-scored // len(seeds))
                    if self.joined:
                        found.append(ForwardShape(1, max(map(sum, sizes)), scored, masked=False, joined=True))
                        continue
                    rows, length = max(map(len, sizes)), max(map(max, sizes))
                    found.append(ForwardShape(rows, length, scored, self.pack_tokens is not None))
        largest = (max(found, key=lambda shape: shape.tokens), max(found, key=lambda shape: shape.length))
        return list(dict.fromkeys(largest))

    def packs(self, rows: np.ndarray) -> list[list[int]]:
        """Put the rows of a step into packs of at most ``pack_tokens`` tokens, a multiple of the step's
        micro-batches.
        """
        assert self.pack_tokens is not None
        micro_batches = self.accumulate * self.world_size
        most = len(rows) // micro_batches
        for per_micro_batch in range(self._packs_per_micro_batch(most), most + 1):
            packs = self._balanced(rows, micro_batches * per_micro_batch)
            if self.lengths[packs[-1]].sum() <= self.pack_tokens:
                return packs
        raise AssertionError("a pack of one row always fits")

    def _balanced(self, rows: np.ndarray, parts: int) -> list[list[int]]:
        """Divide the rows of a step into parts of nearly equal length, the shortest part first."""
        shortest: list[tuple[int, int]] = [(0, i) for i in range(parts)]
        found: list[list[int]] = [[] for _ in shortest]
        for row in reversed(rows.tolist()):
            tokens, i = shortest[0]
            heapq.heapreplace(shortest, (tokens + int(self.lengths[row]), i))
            found[i].append(row)
        # parts of like length together, as rows are without packing
        return [found[i] for _, i in sorted(shortest)]

    def _dealt(self, rows: np.ndarray) -> list[list[int]]:
        """Deal the rows of a step to the micro-batches of all ranks, where they are not packed."""
        slots = self.accumulate * self.world_size
        return self._balanced(rows, slots) if self.joined else rows.reshape(slots, -1).tolist()

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """Give what this rank sees in one optimizer step."""
        orders = [self.order(seed, step) for seed in self.seeds]
        num_items = tuple(int(self.num_items[rows].sum()) for rows in orders)
        is_packed = self.pack_tokens is not None and not self.joined
        packs = [self.packs(rows) for rows in orders] if is_packed else []
        dealt = [] if is_packed else [self._dealt(rows) for rows in orders]
        for micro in range(self.accumulate):
            slot = micro * self.world_size + self.rank
            if not is_packed:
                yield MicroBatch(tuple(tuple(parts[slot]) for parts in dealt), num_items, joined=self.joined)
            else:
                sizes = [len(each) // (self.accumulate * self.world_size) for each in packs]
                mine = [each[slot * size : (slot + 1) * size] for each, size in zip(packs, sizes, strict=True)]
                rows = tuple(tuple(row for pack in each for row in pack) for each in mine)
                yield MicroBatch(rows, num_items, tuple(tuple(map(len, each)) for each in mine))

    def __iter__(self) -> Iterator[MicroBatch]:
        start, self.start = self.start, 0
        for step in range(start // self.accumulate, self.steps):
            skipped = start % self.accumulate if step == start // self.accumulate else 0
            yield from islice(self.micro_batches(step), skipped, None)

    def padding(self, *, steps: int = _LOOKED_AT) -> float:
        """Return the share of padding among the tokens in the forwards of the first ``steps`` optimizer steps."""
        if self.joined:
            return 0.0
        real = total = 0
        for step in range(min(steps, self.steps)):
            for micro in self.micro_batches(step):
                sizes = [[int(self.lengths[pack].sum()) for pack in packs] for packs in micro.groups()]
                real += sum(map(sum, sizes))
                total += len(sizes) * max(map(len, sizes)) * max(map(max, sizes))
        return 1 - real / total


class ReplicaLoader(DataLoader[dict[str, object]]):
    """A DataLoader whose position is part of Lightning's checkpoint, so that a resumed epoch goes on where it was."""

    sampler: ReplicaSampler

    def __iter__(self) -> Iterator[dict[str, object]]:  # type: ignore[override]
        sampler = self.sampler
        assert isinstance(sampler, ReplicaSampler)
        self._position = sampler.start
        for batch in super().__iter__():
            self._position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, and the number of micro-batches handed out in it."""
        assert isinstance(self.sampler, ReplicaSampler)
        return {"epoch": self.sampler.epoch, "position": getattr(self, "_position", 0)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the micro-batches of :meth:`state_dict`, if the epoch is the same."""
        assert isinstance(self.sampler, ReplicaSampler)
        self.sampler.epoch, self.sampler.start = state["epoch"], state["position"]
