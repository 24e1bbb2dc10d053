"""Model soup (Wortsman et al., ICML 2022)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from seedlora.factors import LoRAFactors
from seedlora.merge._lowrank import checked_weights, weighted_sum


def soup(stack: LoRAFactors, *, weights: Float[Tensor, " N"] | list[float] | None = None) -> LoRAFactors:
    r"""Average the updates of ``N`` adapters, exactly, as one adapter of rank ``N*R``.

    .. math:: \bar\Delta = \frac{1}{N} \sum_n w_n B_n A_n

    Updates are averaged, not factors: the result is the same for ``(G A_n, B_n inv(G))``.
    Costs one copy of the factors; no ``(D, K)`` matrix is formed.

    Args:
        stack: ``A`` of shape ``(N, R, K)`` and ``B`` of shape ``(N, D, R)``, scaling folded into ``B``.
        weights: importance weights of shape ``(N,)``, used as given. Default: 1 each, the plain mean.

    Returns:
        One adapter of rank ``N*R``, in the dtypes of ``stack``.

    Raises:
        ValueError: if ``weights`` is not of shape ``(N,)``.

    References:
        Wortsman et al., "Model soups", ICML 2022, arXiv 2203.05482.
    """
    return weighted_sum(stack, checked_weights(stack, weights) / len(stack))
