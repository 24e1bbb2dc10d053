"""Steps that thin out updates before they are combined; each works on any block of entries.

Shape legend: ``N`` adapters, ``...`` entries of one block, ``P`` rows and ``K`` columns of a row block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

_BINS = 2**15


def magnitude_thresholds(
    entries: Callable[[], Iterable[Float[Tensor, "N ..."]]], density: float
) -> Float[Tensor, " N"]:
    r"""The magnitude of each adapter's k-th largest entry, :math:`k = \lfloor density \cdot count \rfloor`, at least 1.

    Exact, in two passes and bounded memory however many entries there are: the first counts magnitudes by their
    exponent and seven bits of mantissa, the second sorts the one bin that holds the k-th.

    Args:
        entries: the blocks of all entries, from the start at each call, with the same bits.
        density: share of the entries to keep, in (0, 1].

    Returns:
        Shape ``(N,)``, in the dtype of the entries; 0 where everything is kept (``density = 1``).
    """
    counts, total = None, 0
    like = None
    for block in entries():
        if density >= 1:
            return block.new_zeros(len(block))
        like, total = block, total + block[0].numel()
        part = torch.stack([torch.bincount(_bins(magnitudes), minlength=_BINS) for magnitudes in _magnitudes(block)])
        counts = part if counts is None else counts + part
    if counts is None or like is None:
        raise ValueError("magnitude_thresholds needs at least one block of entries, got none")
    k = max(1, int(density * total))
    above = counts.flip(1).cumsum(1).flip(1)  # entries in this bin or a higher one
    chosen = (above >= k).sum(1) - 1
    within = k - (above.gather(1, chosen[:, None])[:, 0] - counts.gather(1, chosen[:, None])[:, 0])
    found: list[list[Tensor]] = [[] for _ in range(len(like))]
    for block in entries():
        for n, magnitudes in enumerate(_magnitudes(block)):
            found[n].append(magnitudes[_bins(magnitudes) == chosen[n]])
    return torch.stack([torch.cat(f).topk(int(j)).values[-1] for f, j in zip(found, within, strict=True)])


def _magnitudes(block: Float[Tensor, "N ..."]) -> Iterator[Float[Tensor, " entries"]]:
    """One adapter at a time, so that no copy of the whole block is made."""
    for values in block:
        yield values.abs().flatten()


def _bins(magnitudes: Float[Tensor, " entries"]) -> Int[Tensor, " entries"]:
    """The upper half of their float32 bits, which is in the order of the numbers."""
    return magnitudes.float().view(torch.int32) >> 16


def trim(values: Float[Tensor, "N ..."], thresholds: Float[Tensor, " N"]) -> Float[Tensor, "N ..."]:
    """Zero the entries whose magnitude is below their adapter's threshold."""
    # hardshrink zeroes |x| <= limit in one pass, nine times as fast as torch.where; the number below keeps |x| = limit
    limits = torch.nextafter(thresholds.to(values), thresholds.new_tensor(-1.0).to(values)).tolist()
    return torch.stack([torch.nn.functional.hardshrink(v, limit) for v, limit in zip(values, limits, strict=True)])


def drop(values: Float[Tensor, "N ..."], p: float, generator: torch.Generator) -> Float[Tensor, "N ..."]:
    r"""DARE: zero each entry with probability ``p``, multiply the others by :math:`1/(1-p)`."""
    if p == 0:
        return values
    # a third of the time that bernoulli_ takes; a probability is met to 2**-24
    keep = torch.rand(values.shape, generator=generator, device=generator.device).lt_(1 - p)
    return keep.to(values).div_(1 - p).mul_(values)


def drop_by_rank(
    values: Float[Tensor, "N P K"], density: float, epsilon: float, generator: torch.Generator
) -> Float[Tensor, "N P K"]:
    r"""DELLA's MagPrune: keep the entry of rank j (0 the smallest) of a row with probability
    :math:`q_j = density - \epsilon + 2 \epsilon j / (K - 1)`, and multiply it by :math:`1/q_j`.
    """
    k = values.shape[-1]
    ranks = values.abs().argsort(-1).argsort(-1).to(values.dtype)
    probabilities = density - epsilon + 2 * epsilon * ranks / max(k - 1, 1)
    draw = torch.rand(values.shape, device=generator.device, generator=generator).to(values.device)
    return (values / probabilities).mul_(draw < probabilities)


def stream(generator: torch.Generator | None) -> Callable[[], torch.Generator]:
    """Turn a generator into a source of equal ones, so that a second pass over a layer drops the same entries.

    Takes one number from ``generator``. Default: the stream of seed 0.
    """
    generator = generator or torch.Generator().manual_seed(0)
    device = generator.device
    seed = int(torch.randint(2**62, (), generator=generator, device=device))
    return lambda: torch.Generator(device).manual_seed(seed)
