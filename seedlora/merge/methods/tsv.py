"""Task singular vectors (Gargiulo et al., CVPR 2025): put them side by side and make them orthogonal."""

from __future__ import annotations

import torch

from seedlora.updates.algebra import factor_grams, in_span, inverse_root, thin_svd
from seedlora.updates.factors import LoRAFactors


def tsv_m(stack: LoRAFactors, *, k: int | None = None, scale: float = 1.0) -> LoRAFactors:
    r"""Put the adapters' singular vectors side by side, make them orthogonal, and put the updates together again.

    .. math:: \Delta_n \approx U_n S_n V_n^\top \text{ (rank k)}, \quad
        \Delta = \lambda \, \mathrm{polar}[U_1 | ...] \; \mathrm{diag}(S_1, ...) \; \mathrm{polar}[V_1 | ...]^\top

    where the polar factor is the nearest matrix with orthonormal columns.

    Cost: ``(D + K) * (N*R)**2`` multiplications and SVDs of size ``N*R``; no ``(D, K)`` matrix is formed.

    Readings taken: k is the adapters' rank (the paper's share of the full rank means nothing for LoRA). Where the
    vectors are dependent (identical adapters), the polar factor is the partial isometry, so that identical adapters
    merge to themselves.

    Args:
        stack: the adapters of one layer.
        k: singular vectors per adapter. Default: all.
        scale: :math:`\lambda`.

    Returns:
        One adapter of rank at most ``N*R``, in the dtypes of ``stack``.

    Raises:
        ValueError: if ``k`` is less than 1.

    References:
        Gargiulo et al., "Task Singular Vectors", arXiv 2412.00081, algorithm 1 (TSV-Merge).

    Example:
        >>> import torch
        >>> from seedlora import LoRAFactors
        >>> stack = LoRAFactors(A=torch.eye(2)[:, None], B=torch.tensor([[[3.0], [0]], [[0], [1.0]]]))
        >>> tsv_m(stack).dense()  # orthogonal already: the sum
        tensor([[[3., 0.],
                 [0., 1.]]])
    """
    if k is not None and k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    n, r = len(stack), stack.rank
    gram_b, gram_a = factor_grams(stack)
    blocks = [slice(i * r, (i + 1) * r) for i in range(n)]
    svds = [thin_svd(gram_b[block, block], gram_a[block, block]) for block in blocks]
    left = torch.block_diag(*(svd.left[:, :k] for svd in svds))
    right = torch.block_diag(*(svd.right[:k] for svd in svds))
    s = torch.cat([svd.s[:k] for svd in svds])
    left = left @ inverse_root(left.T @ gram_b @ left)
    right = inverse_root(right @ gram_a @ right.T) @ right
    return in_span(stack, left * s * scale, right)
