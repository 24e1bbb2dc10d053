"""Model Stock (Jang et al., ECCV 2024): shrink the average by as much as the updates disagree."""

from __future__ import annotations

from seedlora.updates.algebra import gram, mean_cosine, weighted_sum
from seedlora.updates.dense import AnyUpdates


def model_stock(stack: AnyUpdates) -> AnyUpdates:
    r"""Shrink the average towards the base model by as much as the updates disagree.

    .. math:: \Delta = t \bar\Delta, \qquad t = \frac{N c}{1 + (N-1) c}

    with c the mean cosine over all pairs. Cost: ``(D + K) * (N*R)**2`` multiplications, one copy of the factors.

    Readings taken: the paper has the angle of one pair (N = 2) or of fixed pairs; here it is the mean cosine, per
    layer. t is a place between the base model and the average, so a negative c gives t = 0, the base model: the formula
    would go beyond it, without limit as the average vanishes. For N = 1, t = 1.

    Args:
        stack: the adapters of one layer.

    Returns:
        One adapter of rank ``N*R``, in the dtypes of ``stack``.

    References:
        Jang, Yun and Han, "Model Stock: All we need is just a few fine-tuned models", arXiv 2403.19522.

    Example:
        >>> import torch
        >>> from seedlora import LoRAFactors
        >>> stack = LoRAFactors(A=torch.tensor([[[1.0, 1, 0]], [[0, 1.0, 1]]]), B=torch.ones(2, 1, 1))
        >>> model_stock(stack).dense()  # the cosine is 1/2, so t is 2/3
        tensor([[[0.3333, 0.6667, 0.3333]]])
    """
    n = len(stack)
    c = mean_cosine(gram(stack)).clamp_min(0)
    t = n * c / (1 + (n - 1) * c)
    return weighted_sum(stack, t.expand(n) / n)
