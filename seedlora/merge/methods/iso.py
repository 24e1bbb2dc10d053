"""Isotropic merging (Marczak et al., ICML 2025): give all singular values one size."""

from __future__ import annotations

from seedlora.updates.algebra import factor_grams, in_span, thin_svd
from seedlora.updates.factors import LoRAFactors


def iso_c(stack: LoRAFactors, *, scale: float | None = None) -> LoRAFactors:
    r"""Replace all singular values of the summed update by their mean.

    .. math:: \sum_n \Delta_n = U \, \mathrm{diag}(s) \, V^\top, \qquad \Delta = \lambda \bar s \, U V^\top

    Cost: ``(D + K) * (N*R)**2`` multiplications and one SVD of size ``N*R``; no ``(D, K)`` matrix is formed.

    Readings taken: the mean is over the singular values that are not zero (at most ``N*R``): the zeros of a LoRA
    update belong to directions that no adapter has learnt. The paper tunes :math:`\lambda` on validation data.

    Args:
        stack: the adapters of one layer.
        scale: :math:`\lambda`. Default: ``1 / N``, which makes the sum a mean, as adapters of one task need it.

    Returns:
        One adapter of rank at most ``N*R``, in the dtypes of ``stack``.

    References:
        Marczak et al., "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces",
        arXiv 2502.04959 (Iso-C).

    Example:
        >>> import torch
        >>> from seedlora import LoRAFactors
        >>> stack = LoRAFactors(A=torch.eye(2)[:, None], B=torch.tensor([[[3.0], [0]], [[0], [1.0]]]))
        >>> iso_c(stack).dense()  # of the mean diag(3, 1) / 2 with equal values
        tensor([[[1., 0.],
                 [0., 1.]]])
    """
    scale = 1 / len(stack) if scale is None else scale
    svd = thin_svd(*factor_grams(stack))
    return in_span(stack, svd.left * (scale * svd.s.mean()), svd.right)
