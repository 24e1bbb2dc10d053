"""Model Stock (Jang et al., ECCV 2024)."""

from __future__ import annotations

from seedlora.merge._dense import AnyUpdates
from seedlora.merge._lowrank import gram, mean_cosine, weighted_sum


def model_stock(stack: AnyUpdates) -> AnyUpdates:
    r"""Shrink the average towards the base model by as much as the updates disagree.

    .. math:: \Delta = t \bar\Delta, \qquad t = \frac{N c}{1 + (N-1) c}

    with c the mean cosine over all pairs. Cost: ``(D + K) * (N*R)**2`` multiplications, one copy of the factors.

    Readings taken: the paper has the angle of one pair (N = 2) or of fixed pairs; here it is the mean cosine, per
    layer. A negative c gives a negative t, as the formula says. For N = 1, t = 1.

    Args:
        stack: the adapters of one layer.

    Returns:
        One adapter of rank ``N*R``, in the dtypes of ``stack``.

    References:
        Jang, Yun and Han, "Model Stock: All we need is just a few fine-tuned models", arXiv 2403.19522.
    """
    n = len(stack)
    inner = gram(stack)
    c = mean_cosine(inner)
    # 1 + (N-1) c is a sum of cosines of a positive semidefinite matrix; it is 0 only where the mean is 0 as well.
    t = n * c / (1 + (n - 1) * c).clamp_min(1e-12)
    return weighted_sum(stack, t.expand(n) / n)
