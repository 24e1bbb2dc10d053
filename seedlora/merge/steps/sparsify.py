"""Steps that thin out updates before they are combined; each works on any block of entries.

Shape legend: ``N`` adapters, ``...`` entries of one block, ``P`` rows and ``K`` columns of a row block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

#: The upper half of a float32's bits without the sign: exponent and seven bits of mantissa.
_BINS = 2**15
#: Share of the columns from which a threshold is guessed before it is found exactly.
_COLUMNS_PER_SAMPLE = 16
#: Numbers that wait to be counted.
_MOST_WAITING = 2**20


def magnitude_thresholds(
    entries: Callable[[int], Iterable[Float[Tensor, "N ..."]]], density: float
) -> Float[Tensor, " N"]:
    r"""Find the magnitude of each adapter's k-th largest entry, :math:`k = \lfloor density \cdot count \rfloor`, at
    least 1.

    Exact, in one pass over all entries and bounded memory: a sixteenth of the columns tells between which magnitudes
    the k-th lies, and the pass counts what is above and, by float32 number, what is between. Where the sample was
    misleading, all entries are counted first. float64 entries take one more pass, over those that round to the number
    found.

    Args:
        entries: the blocks of all entries when called with 1, of every s-th column when called with s; from the start
            at each call, with the same bits.
        density: share of the entries to keep, in (0, 1].

    Returns:
        Shape ``(N,)``, in the dtype of the entries; 0 where everything is kept (``density = 1``).
    """
    like = next(block.new_zeros(len(block)) for block in entries(_COLUMNS_PER_SAMPLE))
    if density >= 1:
        return like
    for step in (_COLUMNS_PER_SAMPLE, 1):
        tallies = _estimate_brackets(entries(step), density, slack=0.01 if step > 1 else 0.0)
        for block in entries(1):
            for tally, magnitudes in zip(tallies, _magnitudes(block), strict=True):
                tally.add(magnitudes)
        k = max(1, int(density * tallies[0].total))
        if all(tally.holds(k) for tally in tallies):
            break
    found = [tally.kth(k) for tally in tallies]
    if like.dtype == torch.float64:
        found = _resolve_ties(entries(1), found)
    return like.new_tensor([value for value, _ in found])


@dataclass
class _MagnitudeTally:
    """Counts the magnitudes of one adapter that are above a bracket, and those within it by their float32 number.

    Args:
        low: where the bracket begins.
        high: the first number above it; float64 entries below may be rounded to it.
    """

    low: float
    high: float
    above: int = 0
    total: int = 0
    #: Float32 bits of the numbers met, ascending, and how often each was met.
    bits: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    waiting: list[np.ndarray] = field(default_factory=list)

    def add(self, magnitudes: Float[Tensor, " entries"]) -> None:
        """Count these magnitudes."""
        beyond, within = _count_and_select(magnitudes, self.low, self.high)
        self.total += magnitudes.numel()
        self.above += beyond
        self.waiting.append(_bits(within).cpu().numpy())
        if sum(map(len, self.waiting)) > _MOST_WAITING:
            self.count()

    def count(self) -> None:
        """Sort what was added into the counts."""
        new, counts = np.unique(np.concatenate([self.bits[:0], *self.waiting]), return_counts=True)
        self.bits, places = np.unique(np.concatenate([self.bits, new]), return_inverse=True)
        weights = np.concatenate([self.counts, counts])
        self.counts = np.zeros(len(self.bits), np.int64)
        np.add.at(self.counts, places, weights)
        self.waiting.clear()

    def holds(self, k: int) -> bool:
        """Return whether the k-th largest of all is within the bracket."""
        self.count()
        return self.above < k <= self.above + int(self.counts.sum())

    def kth(self, k: int) -> tuple[float, int]:
        """Return the k-th largest in float32, and which it is of those that are rounded to this number."""
        self.count()
        from_above = self.above + np.cumsum(self.counts[::-1])
        index = int(np.searchsorted(from_above, k))
        before = from_above[index] - self.counts[::-1][index]
        return _float_of(self.bits[::-1][index]), k - int(before)


def _resolve_ties(blocks: Iterable[Float[Tensor, "N ..."]], found: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """Find the float64 entry that is meant, of those that are rounded to the float32 number found."""
    equal: list[list[Tensor]] = [[] for _ in found]
    for block in blocks:
        for parts, magnitudes, (value, _) in zip(equal, _magnitudes(block), found, strict=True):
            parts.append(magnitudes[_rounded(magnitudes) == value])
    return [
        (float(torch.cat(m).sort(descending=True).values[i - 1]), i) for m, (_, i) in zip(equal, found, strict=True)
    ]


def _estimate_brackets(
    blocks: Iterable[Float[Tensor, "N ..."]], density: float, *, slack: float
) -> list[_MagnitudeTally]:
    """Return, for each adapter, magnitudes between which the k-th largest lies, give or take a share of k."""
    counts, total = None, 0
    for block in blocks:
        total += block[0].numel()
        bins = [torch.bincount(_bits(magnitudes) >> 16, minlength=_BINS) for magnitudes in _magnitudes(block)]
        counts = torch.stack(bins) if counts is None else counts + torch.stack(bins)
    if counts is None:
        raise ValueError("magnitude_thresholds needs at least one block of entries, got none")
    k = max(1, int(density * total))
    reach = slack * k + (6 * k**0.5 if slack else 0)
    above = counts.flip(1).cumsum(1).flip(1)  # entries in this bin or a higher one
    # a bin more on either side: float64 entries were rounded into their bins
    lows = ((above >= min(k + reach, total)).sum(1) - 2).clamp_min(0)
    highs = ((above >= max(k - reach, 1)).sum(1) + 1).clamp_max(0x7F80)
    edges = zip(lows.tolist(), highs.tolist(), strict=True)
    return [_MagnitudeTally(_float_of(low << 16), _float_of(high << 16)) for low, high in edges]


def _count_and_select(
    magnitudes: Float[Tensor, " entries"], low: float, high: float
) -> tuple[int, Float[Tensor, " within"]]:
    """Count those that are ``high`` or larger, and select those in ``[low, high)``."""
    if magnitudes.device.type == "cpu":  # numpy compares and selects in an eighth of torch's time
        array = magnitudes.numpy()
        beyond = array >= high
        return int(np.count_nonzero(beyond)), torch.from_numpy(array[(array >= low) ^ beyond])
    larger = magnitudes >= high
    return int(larger.count_nonzero()), magnitudes[(magnitudes >= low) ^ larger]


def _magnitudes(block: Float[Tensor, "N ..."]) -> Iterator[Float[Tensor, " entries"]]:
    """Give the magnitudes of one adapter at a time, so that no copy of the whole block is made."""
    for values in block:
        yield values.abs().flatten()


def _bits(magnitudes: Float[Tensor, " entries"]) -> Int[Tensor, " entries"]:
    """Return the bits of magnitudes as float32, which are in the order of the numbers."""
    return _rounded(magnitudes).view(torch.int32)


def _rounded(magnitudes: Float[Tensor, " entries"]) -> Float[Tensor, " entries"]:
    """Return the float32 numbers by which magnitudes are counted."""
    return magnitudes.float()


def _float_of(bits: int) -> float:
    return float(np.int32(bits).view(np.float32))


def trim(values: Float[Tensor, "N ..."], thresholds: Float[Tensor, " N"]) -> Float[Tensor, "N ..."]:
    """Zero the entries whose magnitude is below their adapter's threshold."""
    # hardshrink zeroes |x| <= limit in one pass, nine times as fast as torch.where; the number below keeps |x| = limit
    limits = torch.nextafter(thresholds.to(values), thresholds.new_tensor(-1.0).to(values)).tolist()
    trimmed = torch.empty_like(values)
    for v, limit, out in zip(values, limits, trimmed, strict=True):
        torch.ops.aten.hardshrink.out(v, limit, out=out)
    return trimmed


def drop(values: Float[Tensor, "N ..."], p: float, generator: torch.Generator) -> Float[Tensor, "N ..."]:
    r"""Zero each entry with probability ``p`` and multiply the others by :math:`1/(1-p)`, as DARE does.

    32 random bits decide on an entry: ``1 - p`` is rounded to a multiple of :math:`2^{-32}`, and the factor with it,
    so that the expectation stays that of ``values``.
    """
    if p == 0:
        return values
    kept = min(max(1, round((1 - p) * 2**32)), 2**32 - 1)
    # Two entries to a draw: half the time of a number each, which was over half of the whole rule's.
    draws = torch.empty(-(-values.numel() // 2), dtype=torch.int64, device=generator.device)
    bits = draws.random_(-(2**63), None, generator=generator).view(torch.int32)[: values.numel()]
    keep = bits.view(values.shape) < kept - 2**31
    return keep.to(values).mul_(2**32 / kept).mul_(values)


def drop_by_rank(
    values: Float[Tensor, "N P K"], density: float, epsilon: float, generator: torch.Generator
) -> Float[Tensor, "N P K"]:
    r"""Keep entries at random, large ones more often, and rescale them: DELLA's MagPrune.

    The entry of rank j (0 the smallest) of a row is kept with probability
    :math:`q_j = density - \epsilon + 2 \epsilon j / (K - 1)`, and multiplied by :math:`1/q_j`.
    """
    k = values.shape[-1]
    ranks = values.abs().argsort(-1).argsort(-1).to(values.dtype)
    probabilities = density - epsilon + 2 * epsilon * ranks / max(k - 1, 1)
    draw = torch.rand(values.shape, device=generator.device, generator=generator).to(values.device)
    return (values / probabilities).mul_(draw < probabilities)


def repeatable_stream(generator: torch.Generator | None) -> Callable[[], torch.Generator]:
    """Turn a generator into a source of equal ones, so that a second pass over a layer drops the same entries.

    Takes one number from ``generator``. Default: the stream of seed 0.
    """
    generator = generator or torch.Generator().manual_seed(0)
    device = generator.device
    seed = int(torch.randint(2**62, (), generator=generator, device=device))
    return lambda: torch.Generator(device).manual_seed(seed)
