"""DELLA (Deep et al., 2024): drop entries at random, small ones more often."""

from __future__ import annotations

import torch

from seedlora.merge.steps.consensus import sign_consensus
from seedlora.merge.steps.sparsify import drop_by_rank, repeatable_stream
from seedlora.updates.algebra import checked_range
from seedlora.updates.dense import BlockMerge, DenseUpdates, Updates, dense_update


def della(
    stack: Updates,
    *,
    density: float = 0.5,
    epsilon: float = 0.15,
    scale: float = 1.0,
    generator: torch.Generator | None = None,
) -> DenseUpdates:
    r"""Keep entries with a probability that grows with their rank in the row, elect signs, average what agrees.

    .. math:: q_j = density - \epsilon + 2\epsilon \frac{j}{K-1}, \qquad
        \hat\tau = m \odot \Delta / q, \quad m \sim \mathrm{Bernoulli}(q)

    where j is an entry's rank by magnitude within its row, 0 the smallest; then as TIES without its trim.

    Cost: one pass over row blocks with two sorts of every row; the result is dense.

    Readings taken: :math:`\epsilon` is half the spread of the probabilities (the paper's is all of it), as
    implementations in use have it; survivors are rescaled by their own probability, as in the paper, which keeps the
    expectation, and not to the norm. Entries of equal magnitude are ranked in any order.

    Args:
        stack: the adapters of one layer.
        density: mean probability to keep an entry.
        epsilon: half the difference between the largest and the smallest probability.
        scale: factor of the result.
        generator: of the masks. Default: the stream of seed 0.

    Returns:
        A dense update of full rank.

    Raises:
        ValueError: unless ``0 < density - epsilon`` and ``density + epsilon <= 1``.

    References:
        Deep, Bhardwaj and Poria, "DELLA-Merging", arXiv 2406.11617.

    Example:
        >>> import torch
        >>> from seedlora import LoRAFactors
        >>> stack = LoRAFactors(A=torch.ones(2, 1, 1000), B=torch.ones(2, 1, 1))
        >>> della(stack, density=0.25, epsilon=0.0).dense().unique()  # dropped of both, or kept of one at least
        tensor([0., 4.])
    """
    checked_range("density", density, 0, 1, open_low=True)
    if not 0 <= epsilon < density or density + epsilon > 1:
        raise ValueError(f"density - epsilon and density + epsilon must lie in (0, 1], got {density} and {epsilon}")
    generators = repeatable_stream(generator)

    def combine() -> BlockMerge:
        masks = generators()
        return lambda block_NPK: sign_consensus(drop_by_rank(block_NPK, density, epsilon, masks)) * scale

    return dense_update(stack, combine)
