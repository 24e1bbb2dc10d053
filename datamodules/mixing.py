"""Mix several data sets: their rows one after the other, and how often each is in an epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from seedlora.datamodules.rows import Chunk, Counts, TokenRows
from seedlora.utils.options import name_option


def check_mix(mix: Mapping[str, float]) -> None:
    """Raise ValueError for a weight by which nothing can be taken.

    Example:
        >>> check_mix({"b.jsonl": 0})
        Traceback (most recent call last):
            ...
        ValueError: mix gives b.jsonl the weight 0; a weight says how often each row is taken: 2, 1, 0.5
    """
    for path, weight in mix.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ValueError(
                f"{name_option('data.mix')} gives {path} the weight {weight}; a weight says how often each row is "
                "taken: 2, 1, 0.5"
            )


def one_after_the_other(parts: Sequence[TokenRows]) -> Iterator[Chunk]:
    """Give the rows of several data sets as chunks of one, whose rows are numbered through."""
    before = 0
    for part in parts:
        # A part is a file of its own, whose rows have no gaps between them.
        arrays = (part.tokens, part.supervised, part.lengths, part.num_items, part.numbers + before)
        yield Chunk(*arrays, counts=Counts(read=part.counts.read))
        before += part.counts.read


def taken_by_weight(rows: np.ndarray, sets: np.ndarray, weights: Sequence[float], seed: int) -> np.ndarray:
    """Return row numbers in which each row is as often as the weight of its data set says.

    A weight of 2.5 takes each row twice, and a drawn half of them once more.

    Args:
        rows: in an order that was drawn.
        sets: of each row the place of its data set among the weights.
        weights: of the data sets.
        seed: of the draw.

    Example:
        >>> taken_by_weight(np.arange(4), np.array([0, 0, 1, 1]), [1, 2.5], 0).tolist()
        [0, 1, 2, 3, 2, 3, 2]
    """
    taken = []
    for place, weight in enumerate(weights):
        mine, whole = rows[sets == place], int(weight)
        drawn = np.random.default_rng([seed, place]).permutation(len(mine))[: round((weight - whole) * len(mine))]
        taken += [mine] * whole + [mine[np.sort(drawn)]]
    return np.concatenate(taken)
