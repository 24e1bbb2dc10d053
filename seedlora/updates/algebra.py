"""Compute facts about updates, and the low-rank algebra of the rules: no ``(D, K)`` matrix is ever formed.

Shape legend: ``N`` adapters, ``D`` output features, ``K`` input features, ``R`` rank, ``M = N*R`` columns of all
factors side by side, ``Q`` the rank that is really there.

``B_cat`` is ``[B_1 | ... | B_N]`` of shape ``(D, M)``, ``A_cat`` is ``[A_1; ...; A_N]`` of shape ``(M, K)``. Every rule
that is linear, or works in a space that all updates share, is decided by the two Gram matrices ``B_cat^T B_cat`` and
``A_cat A_cat^T`` of size ``(M, M)``. They take the place of a QR of the factors: at ``M`` in the tens they cost a
tenth of it. The price is that directions below 1e-7 of the largest are not seen; in float64 that is the noise of
float32 factors.

Scalars are accumulated in float64, because the variance is a difference of large, near numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from seedlora.updates.dense import AnyUpdates, DenseUpdates, Updates, dense_update
from seedlora.updates.factors import LoRAFactors
from seedlora.utils.torch_internals import write_count

#: Directions whose share of a Gram matrix is below this (1e-7 squared) are noise of its float64 entries.
_NOISE_SHARE = 1e-14
#: An average shorter than this share of the updates is cancellation, not a direction to be scaled up.
CANCELLED = 1e-7
S = TypeVar("S", bound=Updates)
T = TypeVar("T")


def once_per_stack(function: Callable[[S], T]) -> Callable[[S], T]:
    """Remember a small result that is costly to compute, as long as the stack lives and its factors are not written to.

    A rule that depends on the whole model meets each stack once in its survey, and again when it merges the layer.
    Writes through ``.data`` are not noticed. What is remembered must not be handed to callers who may write to it.
    """
    known: WeakKeyDictionary[S, tuple[list[int], T]] = WeakKeyDictionary()

    @wraps(function)
    def remembering(stack: S) -> T:
        factors: list[Tensor] = [stack.A, stack.B] if isinstance(stack, LoRAFactors) else []
        if any(factor.is_inference() for factor in factors):  # these count no writes
            return function(stack)
        versions = [write_count(factor) for factor in factors]
        if stack not in known or known[stack][0] != versions:
            known[stack] = (versions, function(stack))
        return known[stack][1]

    return remembering


def gram(stack: Updates) -> Float[Tensor, "N N"]:
    r"""Return the Frobenius inner products of all pairs of updates, in float64.

    .. math:: G_{ij} = \langle \Delta_i, \Delta_j \rangle = \sum (B_i^\top B_j) \odot (A_i A_j^\top)

    The matrix gives every norm, every cosine and the norm of every weighted sum of the updates. Costs what
    :func:`factor_grams` does, or one pass over dense updates; once for a stack that is not written to.

    Example:
        >>> stack = LoRAFactors(A=torch.tensor([[[4.0, 1, 0]], [[2.0, -3, 1]]]), B=torch.ones(2, 1, 1))
        >>> gram(stack)
        tensor([[17.,  5.],
                [ 5., 14.]], dtype=torch.float64)
    """
    return _gram(stack).clone()


def means(stack: Updates) -> Float[Tensor, " N"]:
    r"""Return the mean entry of each update, in float64: :math:`\mu(\Delta_n) = (1^\top B_n)(A_n 1) / DK`.

    Example:
        >>> stack = LoRAFactors(A=torch.tensor([[[4.0, 1, 0]], [[2.0, -3, 1]]]), B=torch.ones(2, 1, 1))
        >>> means(stack)
        tensor([1.6667, 0.0000], dtype=torch.float64)
    """
    return _means(stack).clone()


def _gram(stack: Updates) -> Float[Tensor, "N N"]:
    if isinstance(stack, DenseUpdates):
        return _dense_gram_and_means(stack)[0]
    gram_b, gram_a = factor_grams(stack)
    n = len(stack)
    return (gram_b * gram_a).unflatten(0, (n, -1)).unflatten(2, (n, -1)).sum((1, 3))


@once_per_stack
def _means(stack: Updates) -> Float[Tensor, " N"]:
    if isinstance(stack, DenseUpdates):
        return _dense_gram_and_means(stack)[1]
    sums = stack.B.sum(1, dtype=torch.float64) * stack.A.sum(2, dtype=torch.float64)
    return sums.sum(1) / (stack.shape[0] * stack.shape[1])


@once_per_stack
def _dense_gram_and_means(stack: DenseUpdates) -> tuple[Float[Tensor, "N N"], Float[Tensor, " N"]]:
    """Compute both together, because a pass over dense updates costs as much as the products."""
    n = len(stack)
    inner = torch.zeros(n, n, dtype=torch.float64, device=stack.device)
    total = torch.zeros(n, dtype=torch.float64, device=stack.device)
    for block in stack.blocks():
        rows = block.flatten(1).double()
        inner.addmm_(rows, rows.T)
        total += rows.sum(1)
    return inner, total / (stack.shape[0] * stack.shape[1])


@once_per_stack
def factor_grams(stack: LoRAFactors) -> tuple[Float[Tensor, "M M"], Float[Tensor, "M M"]]:
    """Return ``B_cat^T B_cat`` and ``A_cat A_cat^T``, in float64; the caller must not write to them.

    Costs ``(D + K) * M**2`` multiplications, once for a stack that is not written to.

    Example:
        >>> stack = LoRAFactors(A=torch.eye(2)[:, None], B=torch.tensor([[[3.0], [0]], [[0], [1.0]]]))
        >>> gram_b, gram_a = factor_grams(stack)
        >>> gram_b
        tensor([[9., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    return _grams(stack.A.double(), stack.B.double())


def _grams(a: Float[Tensor, "N R K"], b: Float[Tensor, "N D R"]) -> tuple[Float[Tensor, "M M"], Float[Tensor, "M M"]]:
    # block by block, which spares a transposed copy of B
    blocks = [[b_i.T @ b_j for b_j in b[: i + 1]] for i, b_i in enumerate(b)]
    rows = [blocks[i] + [blocks[j][i].T for j in range(i + 1, len(b))] for i in range(len(b))]
    a_cat = a.flatten(0, 1)
    return torch.cat([torch.cat(row, 1) for row in rows]), a_cat @ a_cat.T


def variances(stack: Updates) -> Float[Tensor, " N"]:
    r"""Return the population variance of each update's entries, in float64: :math:`\|\Delta_n\|^2 / DK -
    \mu(\Delta_n)^2`.

    Example:
        >>> stack = LoRAFactors(A=torch.tensor([[[4.0, 1, 0]], [[2.0, -3, 1]]]), B=torch.ones(2, 1, 1))
        >>> variances(stack)
        tensor([2.8889, 4.6667], dtype=torch.float64)
    """
    return _variance_from_moments(stack, _gram(stack).diagonal(), _means(stack))


def spread_gain(stack: Updates, weights: Float[Tensor, " N"]) -> Float[Tensor, ""]:
    r"""Return how much more spread updates have than their weighted sum, as SeedLoRA's equation 5 compares them.

    .. math:: g = \frac{1}{N} \sum_n \sigma(\Delta_n) \, / \, \sigma(\textstyle\sum_n w_n \Delta_n)

    1 if the sum has no spread (below 1e-7 of the updates'): that is cancellation, not a direction to be scaled up.

    Example:
        >>> stack = LoRAFactors(A=torch.tensor([[[2.0, 0, -2, 0]], [[0, 2.0, 0, -2]]]), B=torch.ones(2, 1, 1))
        >>> spread_gain(stack, torch.full((2,), 0.5, dtype=torch.float64))
        tensor(1.4142, dtype=torch.float64)
    """
    inner, mu = _gram(stack), _means(stack)
    spread = _variance_from_moments(stack, inner.diagonal(), mu).sqrt().mean()
    total = _variance_from_moments(stack, weights @ inner @ weights, weights @ mu).sqrt()
    return spread / total if total > CANCELLED * spread else torch.ones_like(spread)


def _variance_from_moments(
    stack: Updates, square: Float[Tensor, "*n"], mean: Float[Tensor, "*n"]
) -> Float[Tensor, "*n"]:
    return (square / (stack.shape[0] * stack.shape[1]) - mean**2).clamp_min(0)


def cosines(gram_NN: Float[Tensor, "N N"]) -> Float[Tensor, "N N"]:
    """Return the cosines of all pairs, from their inner products; 0 where an update is zero.

    Example:
        >>> cosines(torch.tensor([[4.0, 2.0], [2.0, 4.0]]))
        tensor([[1.0000, 0.5000],
                [0.5000, 1.0000]])
    """
    norms = gram_NN.diagonal().clamp_min(0).sqrt()
    return (gram_NN / (norms[:, None] * norms)).nan_to_num(0, 0, 0).clamp(-1, 1)


def mean_cosine(gram_NN: Float[Tensor, "N N"]) -> Float[Tensor, ""]:
    """Return the mean cosine over all pairs of different adapters; 1 for a single one.

    Example:
        >>> mean_cosine(torch.tensor([[4.0, 2.0], [2.0, 4.0]]))
        tensor(0.5000)
    """
    n = len(gram_NN)
    if n == 1:
        return gram_NN.new_ones(())
    cosine = cosines(gram_NN)
    return (cosine.sum() - cosine.diagonal().sum()) / (n * (n - 1))


def shrinkage(gram_NN: Float[Tensor, "N N"]) -> Float[Tensor, ""]:
    r"""Return how much shorter the mean update is than the updates are on average.

    .. math:: \rho = \|\bar\Delta\| / \tfrac1N \textstyle\sum_n \|\Delta_n\|

    For equal norms and mean cosine c, :math:`\rho^2 = (1 + (N-1) c) / N`. 1 if all updates are zero.

    Example:
        >>> shrinkage(torch.tensor([[4.0, 0.0], [0.0, 4.0]]))  # two of length 2 at a right angle
        tensor(0.7071)
    """
    norms = gram_NN.diagonal().clamp_min(0).sqrt()
    mean = gram_NN.mean().clamp_min(0).sqrt()
    return mean / norms.mean() if norms.sum() > 0 else gram_NN.new_ones(())


def gain(stack: Updates, fused: Updates) -> Float[Tensor, ""]:
    r"""Return how much longer a merged update is than the mean update, :math:`\|\Delta\| / \|\bar\Delta\|`; 1 if that
    is 0.

    Example:
        >>> stack = LoRAFactors(A=torch.tensor([[[4.0, 1, 0]], [[2.0, -3, 1]]]), B=torch.ones(2, 1, 1))
        >>> gain(stack, weighted_sum(stack, torch.ones(2)))  # the sum is twice the mean
        tensor(2., dtype=torch.float64)
    """
    mean = gram(stack).mean().clamp_min(0).sqrt()
    return gram(fused)[0, 0].clamp_min(0).sqrt() / mean if mean > 0 else torch.ones_like(mean)


def is_nothing(fused: Updates) -> bool:
    """Return whether a merged update is zero: its factors are, or their product is less than rounding leaves of it.

    Example:
        >>> one, same = torch.tensor([[[1.0, 2.0]]]), torch.ones(1, 3, 1)
        >>> is_nothing(LoRAFactors(torch.cat([one, one], 1), torch.cat([same, -same], 2)))
        True
    """
    if isinstance(fused, DenseUpdates):
        return float(gram(fused)[0, 0]) <= 0
    if not (fused.A.any() and fused.B.any()):
        return True
    longest = float(fused.A.double().square().sum() * fused.B.double().square().sum())
    return float(gram(fused)[0, 0]) <= 1e-12 * longest


def weighted_sum(
    stack: AnyUpdates, weights: Float[Tensor, " N"], *, constant: float | Float[Tensor, ""] | None = None
) -> AnyUpdates:
    r"""Return :math:`\sum_n w_n B_n A_n`, exactly, as one adapter of rank ``N*R``: the factors are concatenated.

    Args:
        stack: the adapters.
        weights: one per adapter; they go into ``B``.
        constant: a number to add to all ``D*K`` entries; it takes one more rank, a row of ones in ``A``.

    Returns:
        One adapter (``N = 1``), in the dtypes of ``stack``; dense, if ``stack`` is.

    Example:
        >>> stack = LoRAFactors(A=torch.tensor([[[4.0, 1, 0]], [[2.0, -3, 1]]]), B=torch.ones(2, 1, 1))
        >>> weighted_sum(stack, torch.tensor([1.0, 0.5]), constant=10.0).dense()
        tensor([[[15.0000,  9.5000, 10.5000]]])
    """
    if isinstance(stack, DenseUpdates):
        shift = 0.0 if constant is None else float(constant)

        def merge(block: Float[Tensor, "N P K"]) -> Float[Tensor, "P K"]:
            return torch.tensordot(weights.to(block), block, 1) + shift

        return dense_update(stack, lambda: merge, rank=len(stack) * stack.rank + (constant is not None))
    (n, r), (d, k) = (len(stack), stack.rank), stack.shape
    extra = 0 if constant is None else 1
    a, b = stack.A.new_empty(1, n * r + extra, k), stack.B.new_empty(1, d, n * r + extra)
    a[0, : n * r].view(n, r, k).copy_(stack.A)
    for i, weight in enumerate(weights.tolist()):
        # bfloat16 times a number is computed in float32 and rounded once
        b[0, :, i * r : (i + 1) * r] = stack.B[i] * weight
    if constant is not None:
        a[0, -1], b[0, :, -1] = 1, constant
    return LoRAFactors(a, b)


def in_span(stack: LoRAFactors, left: Float[Tensor, "M Q"], right: Float[Tensor, "Q M"]) -> LoRAFactors:
    """Return the adapter ``(B_cat left) (right A_cat)``, of rank ``Q``.

    Costs ``(D + K) * M * Q`` multiplications in float32 (float64 for float64 factors); dtypes are those of ``stack``.

    Example:
        >>> stack = LoRAFactors(A=torch.eye(2)[:, None], B=torch.tensor([[[3.0], [0]], [[0], [1.0]]]))
        >>> in_span(stack, torch.eye(2), torch.eye(2)).dense()  # all side by side: the sum
        tensor([[[3., 0.],
                 [0., 1.]]])
    """
    a = stack.A.flatten(0, 1)
    return with_rows(stack, left, right.to(_compute_dtype(a)) @ a.to(_compute_dtype(a)))


def with_rows(stack: LoRAFactors, left: Float[Tensor, "M Q"], rows: Float[Tensor, "Q K"]) -> LoRAFactors:
    """Return the adapter ``(B_cat left) rows``, of rank ``Q``, in the dtypes of ``stack``.

    Example:
        >>> stack = LoRAFactors(A=torch.eye(2)[:, None], B=torch.tensor([[[3.0], [0]], [[0], [1.0]]]))
        >>> with_rows(stack, torch.eye(2), torch.tensor([[1.0, 1.0], [0.0, 1.0]])).dense()
        tensor([[[3., 3.],
                 [0., 1.]]])
    """
    first, *others = zip(
        stack.B.to(_compute_dtype(stack.B)), left.to(_compute_dtype(stack.B)).split(stack.rank), strict=True
    )
    b = first[0] @ first[1]
    for b_n, left_n in others:  # adapter by adapter, which spares a transposed copy of B
        b.addmm_(b_n, left_n)
    return LoRAFactors(rows[None].to(stack.A.dtype), b[None].to(stack.B.dtype))


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def orthobasis(gram_MM: Float[Tensor, "M M"]) -> tuple[Float[Tensor, "M Q"], Float[Tensor, "Q M"]]:
    """Return P and C, such that ``X P`` has orthonormal columns and ``X = (X P) C``, given only ``X^T X``.

    Columns are brought to length 1 before the eigenvalues are taken, so that factors of very different size
    (a gauge of ``diag(1e3, 1e-3)``, say) lose no digits. ``Q`` is the rank of ``X``; at least 1.

    Example:
        >>> x = torch.tensor([[3.0, 3.0], [4.0, 4.0]])  # of rank 1
        >>> to_basis, coordinates = orthobasis(x.T @ x)
        >>> (x @ to_basis).norm(dim=0), x @ to_basis @ coordinates
        (tensor([1.]), tensor([[3.0000, 3.0000],
                [4.0000, 4.0000]]))
    """
    lengths = gram_MM.diagonal().clamp_min(0).sqrt()
    lengths = torch.where(lengths > 0, lengths, 1.0)
    values, vectors = torch.linalg.eigh(gram_MM / (lengths[:, None] * lengths))
    keep = values > _NOISE_SHARE * len(values) * values[-1].clamp_min(0)
    if not bool(keep.any()):
        return gram_MM.new_zeros(len(gram_MM), 1), gram_MM.new_zeros(1, len(gram_MM))
    roots, vectors = values[keep].sqrt(), vectors[:, keep]
    return vectors / roots / lengths[:, None], (vectors * roots).T * lengths


def left_singular(gram_MM: Float[Tensor, "M M"]) -> tuple[Float[Tensor, "M Q"], Float[Tensor, " Q"]]:
    """Return P and s, such that ``X P`` are the left singular vectors of X and s its singular values, from ``X^T X``.

    Largest first. The sign of a vector is arbitrary, as in every SVD.

    Example:
        >>> x = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
        >>> left_singular(x.T @ x)[1]
        tensor([3., 2.])
    """
    to_basis, coordinates = orthobasis(gram_MM)
    vectors, values, _ = torch.linalg.svd(coordinates, full_matrices=False)
    keep = values > _NOISE_SHARE**0.5 * values[0]
    keep[0] = True
    return to_basis @ vectors[:, keep], values[keep]


def inverse_root(gram_MM: Float[Tensor, "M M"]) -> Float[Tensor, "M M"]:
    """Return the symmetric pseudo-inverse of the square root; X multiplied by it from the right is X's polar factor.

    Where ``X`` lacks rank, that is the partial isometry: missing directions stay missing, none is made up.

    Example:
        >>> inverse_root(torch.diag(torch.tensor([4.0, 9.0])))
        tensor([[0.5000, 0.0000],
                [0.0000, 0.3333]])
    """
    values, vectors = torch.linalg.eigh(gram_MM)
    keep = values > 1e-10 * values[-1].clamp_min(0)
    return (vectors[:, keep] / values[keep].sqrt()) @ vectors[:, keep].T


@dataclass(frozen=True)
class ThinSVD:
    """The SVD of ``B_cat W A_cat``: left vectors ``B_cat left``, values ``s``, right vectors ``right A_cat``."""

    left: Float[Tensor, "M Q"]
    s: Float[Tensor, " Q"]
    right: Float[Tensor, "Q M"]


def thin_svd(
    gram_b: Float[Tensor, "M M"], gram_a: Float[Tensor, "M M"], weights: Float[Tensor, " M"] | None = None
) -> ThinSVD:
    """Return the SVD of ``B_cat diag(weights) A_cat`` from the two Gram matrices; costs ``M**3``.

    Values below 1e-7 of the largest are left out; one is kept at least.

    Example:
        >>> stack = LoRAFactors(A=torch.eye(2)[:, None], B=torch.tensor([[[3.0], [0]], [[0], [1.0]]]))
        >>> thin_svd(*factor_grams(stack)).s  # of the sum
        tensor([3., 1.], dtype=torch.float64)
    """
    left, coordinates_b = orthobasis(gram_b)
    right, coordinates_a = orthobasis(gram_a)
    core = coordinates_b @ coordinates_a.T if weights is None else (coordinates_b * weights) @ coordinates_a.T
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    keep = s > _NOISE_SHARE**0.5 * s[0]
    keep[0] = True
    return ThinSVD(left @ u[:, keep], s[keep], vh[keep] @ right.T)


def singular_values(stack: LoRAFactors) -> list[Float[Tensor, " Q"]]:
    """Return the non-zero singular values of each update, largest first, in float64.

    Example:
        >>> stack = LoRAFactors(A=torch.eye(2)[:, None], B=torch.tensor([[[3.0], [0]], [[0], [1.0]]]))
        >>> singular_values(stack)
        [tensor([3.], dtype=torch.float64), tensor([1.], dtype=torch.float64)]
    """
    return [thin_svd(*factor_grams(LoRAFactors(a[None], b[None]))).s for a, b in zip(stack.A, stack.B, strict=True)]


@dataclass(frozen=True)
class Aligned:
    """KnOTS' common basis: ``[Delta_1 | ... | Delta_N] = U diag(s) [V_1 ... V_N]``, kept as its coordinates.

    Attributes:
        left: ``U = B_cat left`` has orthonormal columns.
        s: singular values, largest first.
        rows: ``diag(s) V_n = U^T Delta_n = rows[n] A_n``.
    """

    left: Float[Tensor, "M Q"]
    s: Float[Tensor, " Q"]
    rows: Float[Tensor, "N Q R"]

    def aligned(self, stack: LoRAFactors, step: int = 1) -> Float[Tensor, "N Q K"]:
        """Return every ``step``-th column of the updates in the basis, ``U^T Delta_n``, in float32 (float64 if they
        are).
        """
        return self.rows.to(_compute_dtype(stack.A)) @ stack.A[:, :, ::step].to(_compute_dtype(stack.A))


@once_per_stack
def align(stack: LoRAFactors) -> Aligned:
    """Return the SVD of the updates side by side, without forming any: ``(D + K) * M**2`` multiplications, float64.

    ``A_n = C_n^T Q_n`` with orthonormal rows ``Q_n`` turns ``[Delta_1 | ... ]`` into ``[B_1 C_1^T | ...]`` times
    orthonormal rows, whose left singular vectors and values are the same.

    Example:
        >>> stack = LoRAFactors(A=torch.eye(2)[:, None], B=torch.tensor([[[3.0], [0]], [[0], [1.0]]]))
        >>> align(stack).s  # of the updates side by side
        tensor([3., 1.], dtype=torch.float64)
    """
    n, r = len(stack), stack.rank
    gram_b, gram_a = factor_grams(stack)
    spread = side_by_side(gram_a, r)
    to_left, s = left_singular(spread.T @ gram_b @ spread)
    left = spread @ to_left
    rows = (left.T @ gram_b).view(len(s), n, r).transpose(0, 1)
    return Aligned(left, s, rows)


def side_by_side(gram_MM: Float[Tensor, "M M"], r: int) -> Float[Tensor, "M M"]:
    """Return block-diagonal T, such that ``B_cat T`` has the left singular vectors of the updates side by side.

    Args:
        gram_MM: of the other factors, ``A_cat``; its diagonal blocks of size ``r`` are those of single adapters.
        r: rank of one adapter.

    Example:
        >>> side_by_side(torch.diag(torch.tensor([4.0, 9.0])), r=1)
        tensor([[2., 0.],
                [0., 3.]])
    """
    blocks = torch.stack([gram_MM[i : i + r, i : i + r] for i in range(0, len(gram_MM), r)])
    lengths = blocks.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    safe = torch.where(lengths > 0, lengths, 1.0)
    values, vectors = torch.linalg.eigh(blocks / (safe[:, :, None] * safe[:, None]))
    return torch.block_diag(*(lengths[:, :, None] * vectors * values.clamp_min(0).sqrt()[:, None]))


def checked_weights(stack: Updates, weights: Float[Tensor, " N"] | list[float] | None) -> Float[Tensor, " N"]:
    """Return the caller's weights as a float64 tensor, or ones if there are none.

    Raises:
        ValueError: if there is not exactly one finite weight per adapter.

    Example:
        >>> stack = LoRAFactors(A=torch.tensor([[[4.0, 1, 0]], [[2.0, -3, 1]]]), B=torch.ones(2, 1, 1))
        >>> checked_weights(stack, [1, 3])
        tensor([1., 3.], dtype=torch.float64)
    """
    if weights is None:
        return torch.ones(len(stack), dtype=torch.float64, device=stack.device)
    tensor = torch.as_tensor(weights, dtype=torch.float64, device=stack.device)
    if tensor.shape != (len(stack),) or not bool(tensor.isfinite().all()):
        raise ValueError(f"weights must be {len(stack)} finite numbers, one per adapter, got {tensor.tolist()}")
    return tensor


def checked_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> float:
    """Return ``value``, if it is a number within ``[low, high]`` (``(low, high]`` with ``open_low``).

    Raises:
        ValueError: naming the option, the value and the range.

    Example:
        >>> checked_range("density", 0.2, 0, 1, open_low=True)
        0.2
        >>> checked_range("density", 0, 0, 1, open_low=True)
        Traceback (most recent call last):
            ...
        ValueError: density must be a number in (0, 1], got 0
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (low < value if open_low else low <= value) or value > high:
        raise ValueError(f"{name} must be a number in {'(' if open_low else '['}{low}, {high}], got {value!r}")
    return value


def checked_choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """Return ``value``, if it is one of ``allowed``; else raise ``ValueError`` naming the option and the choices.

    Example:
        >>> checked_choice("scope", "layer", ("layer", "model"))
        'layer'
        >>> checked_choice("scope", "word", ("layer", "model"))
        Traceback (most recent call last):
            ...
        ValueError: scope must be one of 'layer', 'model', got 'word'
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value
