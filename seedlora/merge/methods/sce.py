"""SCE (Wan et al., FuseChat 2024): select, calculate, erase."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from seedlora.merge.steps.consensus import disjoint_mean, elect_sign
from seedlora.merge.steps.sparsify import magnitude_thresholds
from seedlora.updates.algebra import checked_range, gram
from seedlora.updates.dense import DenseUpdates, Updates, dense_update, row_blocks


def sce(stack: Updates, *, select_topk: float = 1.0) -> DenseUpdates:
    r"""Select the entries on which adapters differ most, weigh adapters by their energy there, erase minority signs.

    .. math:: S = \mathrm{top}_{k}(\mathrm{var}_n \Delta_n), \quad
        w_n \propto \textstyle\sum_{j \in S} \Delta_n(j)^2, \quad
        \Delta(j) = \frac{\sum_n w_n \Delta_n(j) [\mathrm{sgn} = \gamma(j)]}{\sum_n w_n [\mathrm{sgn} = \gamma(j)]}

    with :math:`\gamma` the sign of the plain sum; entries outside of S become 0.

    Cost: one pass over row blocks at ``select_topk = 1`` (the weights then come from the factors), three below; the
    result is dense.

    Readings taken: k counts all entries of the layer, also those on which the adapters agree exactly; the variance is
    that over the population of adapters.

    Args:
        stack: the adapters of one layer.
        select_topk: share of entries to keep, in (0, 1].

    Returns:
        A dense update of full rank.

    Raises:
        ValueError: if ``select_topk`` is out of range.

    References:
        Wan et al., "FuseChat: Knowledge Fusion of Chat Models", arXiv 2408.07990, section 3.3.

    Example:
        >>> import torch
        >>> from seedlora import LoRAFactors
        >>> stack = LoRAFactors(A=torch.tensor([[[4.0, 1, 0]], [[2.0, -3, 1]]]), B=torch.ones(2, 1, 1))
        >>> sce(stack).dense()  # weighted by 17 and 14, where the signs agree
        tensor([[[ 3.0968, -3.0000,  1.0000]]])
    """
    checked_range("select_topk", select_topk, 0, 1, open_low=True)
    if select_topk == 1:
        energy = gram(stack).diagonal()

        def erase(block_NPK: Float[Tensor, "N P K"]) -> Float[Tensor, "P K"]:
            return _erase_minority(block_NPK, energy)

        return dense_update(stack, lambda: erase)
    limit = magnitude_thresholds(lambda step: (_variance(block) for block in row_blocks(stack, step)), select_topk)

    def select(block_NPK: Float[Tensor, "N P K"]) -> Float[Tensor, "N P K"]:
        return block_NPK * (_variance(block_NPK) >= limit.to(block_NPK))

    energy = sum((select(block).double().square().sum((1, 2)) for block in row_blocks(stack)), limit.new_zeros(1))

    def select_and_erase(block_NPK: Float[Tensor, "N P K"]) -> Float[Tensor, "P K"]:
        return _erase_minority(select(block_NPK), energy)

    return dense_update(stack, lambda: select_and_erase)


def _variance(block_NPK: Float[Tensor, "N P K"]) -> Float[Tensor, "1 P K"]:
    return block_NPK.var(0, correction=0, keepdim=True)


def _erase_minority(block_NPK: Float[Tensor, "N P K"], energy: Float[Tensor, " N"]) -> Float[Tensor, "P K"]:
    # Weights relative to the largest: a mean does not depend on their scale, but underflow does.
    return disjoint_mean(block_NPK, elect_sign(block_NPK), weights=energy / energy.max().clamp_min(1e-300))
