"""Describe a set of adapters by numbers that are computed from its factors.

Shape legend: ``N`` adapters, ``D`` output features, ``K`` input features, ``R`` rank, ``P`` rows of one block, ``S``
sampled entries, ``E`` edges.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from seedlora.updates.algebra import (
    cosines,
    gram,
    mean_cosine,
    means,
    shrinkage,
    singular_values,
    spread_gain,
    variances,
)
from seedlora.updates.dense import Updates, row_blocks
from seedlora.updates.factors import LoRAFactors


@dataclass(frozen=True)
class UpdateFacts:
    r"""Facts about the update of one adapter in one layer.

    Attributes:
        norm: Frobenius norm.
        mean: of its entries.
        std: of its entries, population.
        singular_values: all that are not zero, largest first.
        effective_rank: :math:`\exp(-\sum p \log p)` with :math:`p = s / \sum s` (Roy and Vetterli, 2007).
    """

    norm: float
    mean: float
    std: float
    singular_values: tuple[float, ...]
    effective_rank: float


@dataclass(frozen=True)
class LayerFacts:
    """Facts about one layer of a set of adapters.

    Attributes:
        path: of the layer.
        module: the last part of the path, ``q_proj``.
        updates: facts about each adapter's update.
        merged: facts about a merged update, if one was given.
        cosines: of all pairs, shape (N, N).
        mean_cosine: over all pairs of different adapters.
        rho: norm of the mean update over the mean norm.
        gain: what SeedLoRA multiplies the mean update with: mean of the spreads over the spread of the mean.
        sign_agreement: share of sampled entries on which two adapters have one sign, mean over the pairs; 1/2 for
            unrelated adapters.
        samples: how many entries were sampled for it.
    """

    path: str
    module: str
    updates: tuple[UpdateFacts, ...]
    merged: UpdateFacts | None
    cosines: tuple[tuple[float, ...], ...]
    mean_cosine: float
    rho: float
    gain: float
    sign_agreement: float
    samples: int


@dataclass(frozen=True)
class ModuleFacts:
    """Means over all layers of one module type; the fields are those of :class:`LayerFacts`."""

    module: str
    layers: int
    mean_cosine: float
    rho: float
    gain: float
    sign_agreement: float
    norm: float
    effective_rank: float
    merged_norm: float | None
    merged_effective_rank: float | None


@dataclass(frozen=True)
class Histogram:
    """Counts of the entries of updates, by size.

    Attributes:
        edges: of the bins, ascending.
        counts: entries of each update in each bin; an entry on an edge is in the bin above it, one on the last edge in
            the last bin.
        entries: of each update, those beyond the edges too.
    """

    edges: tuple[float, ...]
    counts: tuple[tuple[int, ...], ...]
    entries: int

    def __add__(self, other: Histogram) -> Histogram:
        """Return the counts of both together, over the same edges."""
        if self.edges != other.edges or len(self.counts) != len(other.counts):
            raise ValueError("histograms can be added if they are of as many updates over the same edges")
        counts = (
            tuple(a + b for a, b in zip(*rows, strict=True)) for rows in zip(self.counts, other.counts, strict=True)
        )
        return Histogram(self.edges, tuple(counts), self.entries + other.entries)


def natural_sort_key(text: str) -> list[tuple[bool, int, str]]:
    """Return a key that sorts layer 2 before layer 10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", text)]


def layer_facts(
    path: str,
    stack: LoRAFactors,
    *,
    merged: LoRAFactors | None = None,
    samples: int = 4096,
    generator: torch.Generator | None = None,
) -> LayerFacts:
    """Compute all facts about one layer, in ``(D + K) * (N*R)**2`` multiplications; no ``(D, K)`` matrix is formed.

    Args:
        path: of the layer.
        stack: its adapters.
        merged: one adapter that was made of them.
        samples: entries drawn, with replacement, for the sign agreement.
        generator: of the draw. Default: a new one, seeded with 0.
    """
    inner, n = gram(stack), len(stack)
    return LayerFacts(
        path=path,
        module=path.rpartition(".")[2],
        updates=update_facts(stack),
        merged=None if merged is None else update_facts(merged)[0],
        cosines=tuple(tuple(row) for row in cosines(inner).tolist()),
        mean_cosine=float(mean_cosine(inner)),
        rho=float(shrinkage(inner)),
        gain=float(spread_gain(stack, inner.new_full((n,), 1 / n))),
        sign_agreement=sign_agreement(stack, samples=samples, generator=generator),
        samples=samples,
    )


def update_facts(stack: LoRAFactors) -> tuple[UpdateFacts, ...]:
    """Compute the facts about every update of a stack on its own."""
    norms = gram(stack).diagonal().clamp_min(0).sqrt().tolist()
    rows = zip(norms, means(stack).tolist(), variances(stack).sqrt().tolist(), singular_values(stack), strict=True)
    return tuple(
        UpdateFacts(norm, mean, std, tuple(values.tolist()), effective_rank(values)) for norm, mean, std, values in rows
    )


def effective_rank(values: Float[Tensor, " Q"]) -> float:
    """Return the exponential of the entropy of singular values taken as probabilities; 0 for a zero matrix."""
    if not values.sum() > 0:
        return 0.0
    shares = values[values > 0] / values.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


def sampled_entries(
    stack: LoRAFactors, *, samples: int = 4096, generator: torch.Generator | None = None
) -> Float[Tensor, "N S"]:
    """Draw entries of every update at the same random places, with replacement, in ``N*S*R`` multiplications.

    Args:
        stack: the adapters of one layer.
        samples: how many.
        generator: of the places. Default: a new one, seeded with 0.
    """
    generator = generator or torch.Generator().manual_seed(0)
    d, k = stack.shape
    i, j = (torch.randint(size, (samples,), generator=generator).to(stack.A.device) for size in (d, k))
    return torch.einsum("nsr,nrs->ns", stack.B[:, i].double(), stack.A[:, :, j].double())


def histogram(stack: Updates, edges: Float[Tensor, " E"]) -> Histogram:
    """Count every entry of every update, exactly, a block of rows at a time.

    Costs ``N*D*K*R`` multiplications and as many binary searches in the edges as there are entries; one block is held.

    Args:
        stack: the adapters of one layer.
        edges: of the bins, ascending.

    Raises:
        ValueError: if there are fewer than two edges, or they do not ascend.
    """
    if edges.ndim != 1 or len(edges) < 2 or not bool((edges.diff() > 0).all()):
        raise ValueError("histogram needs at least two ascending edges")
    counts = torch.zeros(len(stack), len(edges) - 1, dtype=torch.long)
    for block_NPK in row_blocks(stack):
        block_NPK, bins = block_NPK.cpu(), edges.to(block_NPK.dtype).cpu()
        counts += torch.stack([torch.histogram(rows_PK, bins).hist.long() for rows_PK in block_NPK.flatten(1)])
    rows, columns = stack.shape
    return Histogram(tuple(edges.tolist()), tuple(map(tuple, counts.tolist())), rows * columns)


def sign_agreement(stack: LoRAFactors, *, samples: int = 4096, generator: torch.Generator | None = None) -> float:
    """Return the share of sampled entries on which two adapters have the same sign, mean over the pairs; 1 for one
    adapter.
    """
    if len(stack) == 1:
        return 1.0
    signs_NS = sampled_entries(stack, samples=samples, generator=generator).sign()
    pairs = [(signs_NS[a] == signs_NS[b]).double().mean() for a in range(len(stack)) for b in range(a)]
    return float(torch.stack(pairs).mean())


def module_facts(layers: Sequence[LayerFacts]) -> list[ModuleFacts]:
    """Return one row per module type, in the order in which they first occur."""
    groups: dict[str, list[LayerFacts]] = defaultdict(list)
    for layer in layers:
        groups[layer.module].append(layer)
    return [_module_row(module, group) for module, group in groups.items()]


def _module_row(module: str, group: Sequence[LayerFacts]) -> ModuleFacts:
    def mean(value: Callable[[LayerFacts], float]) -> float:
        return sum(map(value, group)) / len(group)

    def over_updates(value: Callable[[UpdateFacts], float]) -> float:
        return mean(lambda layer: sum(map(value, layer.updates)) / len(layer.updates))

    merged = [layer.merged for layer in group if layer.merged is not None]
    return ModuleFacts(
        module=module,
        layers=len(group),
        mean_cosine=mean(lambda layer: layer.mean_cosine),
        rho=mean(lambda layer: layer.rho),
        gain=mean(lambda layer: layer.gain),
        sign_agreement=mean(lambda layer: layer.sign_agreement),
        norm=over_updates(lambda update: update.norm),
        effective_rank=over_updates(lambda update: update.effective_rank),
        merged_norm=sum(m.norm for m in merged) / len(merged) if merged else None,
        merged_effective_rank=sum(m.effective_rank for m in merged) / len(merged) if merged else None,
    )


def model_cosines(stacks: Mapping[str, LoRAFactors]) -> Float[Tensor, "N N"]:
    """Return the cosines of all pairs of adapters, each taken as one long vector over all layers.

    Raises:
        ValueError: if there is no layer.
    """
    if not stacks:
        raise ValueError("model_cosines needs at least one layer, got none")
    return cosines(torch.stack([gram(stack).cpu() for stack in stacks.values()]).sum(0))
