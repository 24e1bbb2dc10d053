"""DARE (Yu et al., ICML 2024): drop entries at random and rescale the others."""

from __future__ import annotations

import torch

from seedlora.merge.steps.consensus import sign_consensus
from seedlora.merge.steps.sparsify import drop, repeatable_stream
from seedlora.updates.algebra import checked_range
from seedlora.updates.dense import BlockMerge, DenseUpdates, Updates, dense_update


def dare_linear(stack: Updates, *, p: float = 0.5, generator: torch.Generator | None = None) -> DenseUpdates:
    r"""Drop each entry of each update with probability ``p``, rescale the others, average.

    .. math:: \Delta = \frac1N \sum_n \frac{m_n \odot \Delta_n}{1 - p}, \qquad m_n \sim \mathrm{Bernoulli}(1 - p)

    Cost: one pass over row blocks of ``N*P*K`` entries; the result is dense. Its expectation is soup.

    Args:
        stack: the adapters of one layer.
        p: drop probability, in [0, 1). The literature also uses 0.9.
        generator: of the masks. Default: the stream of seed 0.

    Returns:
        A dense update of full rank.

    Raises:
        ValueError: if ``p`` is out of range.

    References:
        Yu et al., "Language Models are Super Mario", arXiv 2311.03099.

    Example:
        >>> import torch
        >>> from seedlora import LoRAFactors
        >>> stack = LoRAFactors(A=torch.ones(2, 1, 1000), B=torch.ones(2, 1, 1))
        >>> dare_linear(stack, p=0.75).dense().unique()  # kept of no adapter, of one, of both
        tensor([0., 2., 4.])
    """
    checked_range("p", p, 0, 1 - 1e-9)
    generators = repeatable_stream(generator)

    def combine() -> BlockMerge:
        masks = generators()
        return lambda block_NPK: drop(block_NPK, p, masks).mean(0)

    return dense_update(stack, combine)


def dare_ties(
    stack: Updates, *, p: float = 0.5, scale: float = 1.0, generator: torch.Generator | None = None
) -> DenseUpdates:
    r"""Drop and rescale as :func:`dare_linear`, then elect signs and average what agrees, as TIES without its trim.

    Cost: one pass over row blocks of ``N*P*K`` entries; the result is dense.

    Args:
        stack: the adapters of one layer.
        p: drop probability, in [0, 1).
        scale: factor of the result.
        generator: of the masks. Default: the stream of seed 0.

    Returns:
        A dense update of full rank.

    Raises:
        ValueError: if ``p`` is out of range.

    References:
        Yu et al., arXiv 2311.03099; Yadav et al., arXiv 2306.01708.

    Example:
        >>> import torch
        >>> from seedlora import LoRAFactors
        >>> stack = LoRAFactors(A=torch.ones(2, 1, 1000), B=torch.ones(2, 1, 1))
        >>> dare_ties(stack, p=0.75).dense().unique()  # dropped of both, or kept of one at least
        tensor([0., 4.])
    """
    checked_range("p", p, 0, 1 - 1e-9)
    generators = repeatable_stream(generator)

    def combine() -> BlockMerge:
        masks = generators()
        return lambda block_NPK: sign_consensus(drop(block_NPK, p, masks)) * scale

    return dense_update(stack, combine)
