"""Karcher (Riemannian) mean on the sphere of directions."""

from __future__ import annotations

import torch

from seedlora.updates.algebra import gram, weighted_sum
from seedlora.updates.dense import AnyUpdates


def karcher(stack: AnyUpdates, *, max_iter: int = 10, tol: float = 1e-5) -> AnyUpdates:
    r"""Take the spherical mean of the updates' directions, as long as the updates are on average.

    .. math:: u \leftarrow \exp_u \Big( \frac1N \sum_n \log_u \frac{\Delta_n}{\|\Delta_n\|} \Big), \qquad
        \Delta = \tfrac1N \textstyle\sum_n \|\Delta_n\| \; u

    Every iterate is a weighted sum of the updates, so the iteration runs on ``N`` coefficients and the Gram matrix.
    Cost: ``(D + K) * (N*R)**2`` multiplications, one copy of the factors.

    Readings taken: it starts at the normalised mean of the directions. Zero updates have no direction and take part
    in the mean norm only. If the directions cancel exactly there is no mean; the result is then zero.

    Args:
        stack: the adapters of one layer.
        max_iter: iterations at most.
        tol: stop when the step is shorter, in radians.

    Returns:
        One adapter of rank ``N*R``, in the dtypes of ``stack``.

    References:
        Karcher, "Riemannian center of mass and mollifier smoothing", 1977; the algorithm on the sphere: Buss and
        Fillmore, "Spherical averages and applications", 2001.

    Example:
        >>> import torch
        >>> from seedlora import LoRAFactors
        >>> stack = LoRAFactors(A=torch.tensor([[[3.0, 0]], [[0, 1.0]]]), B=torch.ones(2, 1, 1))
        >>> karcher(stack).dense()  # half way between the directions, of length 2
        tensor([[[1.4142, 1.4142]]])
    """
    inner = gram(stack)
    norms = inner.diagonal().clamp_min(0).sqrt()
    present = norms > 0
    units = torch.diag(torch.where(present, 1 / norms, 0))  # row n: coefficients of unit vector n
    start = units.sum(0)
    length = (start @ inner @ start).clamp_min(0).sqrt()
    if length <= 1e-7 * present.sum():
        return weighted_sum(stack, torch.zeros_like(start))
    u = start / length
    for _ in range(max_iter):
        cosine = (units @ inner @ u).clamp(-1, 1)
        angle = cosine.arccos()
        tangents = (units - cosine[:, None] * u) * torch.where(angle > 1e-9, angle / angle.sin(), 1)[:, None]
        step = tangents[present].mean(0)
        length = (step @ inner @ step).clamp_min(0).sqrt()
        if length < tol:
            break
        u = u * length.cos() + step * (length.sin() / length)
        u = u / (u @ inner @ u).sqrt()
    return weighted_sum(stack, norms.mean() * u)
