"""Every merge method again: dense, float64, slow, written from the formulas. Nothing of the library is imported.

Updates are lists of float64 matrices of shape (D, K).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mean(updates: list[Tensor]) -> Tensor:
    return sum(updates) / len(updates)


def seedlora(updates, weights=None, mean_shift=True):
    w = [1.0] * len(updates) if weights is None else weights
    average = mean([wi * u for wi, u in zip(w, updates, strict=True)])
    mu, sigma = mean([u.mean() for u in updates]), mean([u.std(correction=0) for u in updates])
    spread = average.std(correction=0)
    gain = sigma / spread if spread > 0 else 1.0
    return gain * (average - average.mean()) + mu if mean_shift else gain * average


def seedlora_gain(updates, p=0.5, cap=2.0):
    average = mean(updates)
    rho = average.norm() / mean([u.norm() for u in updates])
    return average * min(float(rho) ** (-2 * p), cap)


def soup(updates, weights=None):
    w = [1.0] * len(updates) if weights is None else weights
    return mean([wi * u for wi, u in zip(w, updates, strict=True)])


def task_arithmetic(updates, scale=None):
    return sum(updates) * (1 / len(updates) if scale is None else scale)


def top_magnitudes(values: Tensor, density: float) -> float:
    """The magnitude of the k-th largest of all entries."""
    flat = values.abs().flatten()
    if density >= 1:
        return 0.0
    return float(flat.sort(descending=True).values[max(1, int(density * flat.numel())) - 1])


def ties_entries(stacked: Tensor, limits: list[float]) -> Tensor:
    """Trim, elect, disjoint mean, one entry after the other."""
    n = len(stacked)
    flat, out = stacked.reshape(n, -1), torch.zeros(stacked[0].numel(), dtype=torch.float64)
    for j in range(flat.shape[1]):
        kept = [float(flat[i, j]) if abs(float(flat[i, j])) >= limits[i] else 0.0 for i in range(n)]
        sign = 1 if math.fsum(kept) >= 0 else -1
        agreeing = [v for v in kept if v * sign > 0]
        out[j] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return out.view(stacked.shape[1:])


def ties(updates, density=0.2, scale=1.0, limits=None):
    limits = [top_magnitudes(u, density) for u in updates] if limits is None else limits
    return scale * ties_entries(torch.stack(updates), limits)


def rule_stream():
    """What a random rule draws from unless it is told: the stream of the first number of seed 0."""
    seed = torch.randint(2**62, (), generator=torch.Generator().manual_seed(0))
    return torch.Generator().manual_seed(int(seed))


def dare_masks(shape, p):
    """Which entries of a block are kept: those whose 32 bits, of 64 for two entries, lie in the lower 1 - p of all."""
    count = math.prod(shape)
    draws = torch.empty(-(-count // 2), dtype=torch.int64).random_(-(2**63), None, generator=rule_stream()).tolist()
    bits = [(half + 2**31) % 2**32 for draw in draws for half in (draw, draw >> 32)]
    return torch.tensor([x < round((1 - p) * 2**32) for x in bits[:count]]).view(shape)


def della_masks(updates, density=0.5, epsilon=0.15):
    """Which entries of a block are kept: those whose uniform number is below their probability."""
    keep = torch.stack([della_probabilities(u, density, epsilon) for u in updates])
    return torch.rand(keep.shape, generator=rule_stream()) < keep


def masked_mean(updates, masks, p):
    return mean([u * m / (1 - p) for u, m in zip(updates, masks, strict=True)])


def masked_ties(updates, masks, keep):
    return ties_entries(
        torch.stack([u * m / q for u, m, q in zip(updates, masks, keep, strict=True)]), [0.0] * len(updates)
    )


def della_probabilities(update, density=0.5, epsilon=0.15):
    keep = torch.zeros_like(update)
    for i, row in enumerate(update):
        order = sorted(range(len(row)), key=lambda j: abs(float(row[j])))
        for rank, j in enumerate(order):
            keep[i, j] = density - epsilon + 2 * epsilon * rank / max(len(row) - 1, 1)
    return keep


def model_stock(updates):
    n = len(updates)
    pairs = [
        float((updates[i] * updates[j]).sum() / (updates[i].norm() * updates[j].norm()))
        for i in range(n)
        for j in range(i)
    ]
    c = max(sum(pairs) / len(pairs), 0.0) if pairs else 1.0
    return n * c / (1 + (n - 1) * c) * mean(updates)


def karcher(updates, iterations=200, tol=1e-13):
    units = [u / u.norm() for u in updates]
    u = mean(units) / mean(units).norm()
    for _ in range(iterations):
        logs = []
        for x in units:
            angle = torch.acos((u * x).sum().clamp(-1, 1))
            direction = x - (u * x).sum() * u
            logs.append(direction * (angle / direction.norm()) if direction.norm() > 1e-12 else direction)
        step = mean(logs)
        if step.norm() < tol:
            break
        u = torch.cos(step.norm()) * u + torch.sin(step.norm()) * step / step.norm()
    return mean([x.norm() for x in updates]) * u


def sce(updates, select_topk=1.0):
    stacked = torch.stack(updates)
    variance = mean([(u - mean(updates)) ** 2 for u in updates])
    selected = stacked * (variance >= top_magnitudes(variance, select_topk))
    energy = selected.square().sum((1, 2))
    sign = torch.where(selected.sum(0) >= 0, 1.0, -1.0)
    out = torch.zeros_like(updates[0])
    for index in torch.cartesian_prod(*(torch.arange(s) for s in out.shape)).tolist():
        i, j = index
        agree = [k for k in range(len(updates)) if selected[k, i, j] * sign[i, j] > 0]
        total = sum(energy[k] for k in agree)
        if agree:
            out[i, j] = sum(energy[k] * selected[k, i, j] for k in agree) / total
    return out


def polar(x: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    keep = s > 1e-6 * s[0]
    return u[:, keep] @ vh[keep]


def truncated(x: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


def tsv_m(updates, rank):
    svds = [torch.linalg.svd(u, full_matrices=False) for u in updates]
    left = torch.cat([u[:, :rank] for u, _, _ in svds], 1)
    right = torch.cat([vh[:rank].T for _, _, vh in svds], 1)
    s = torch.cat([s[:rank] for _, s, _ in svds])
    return polar(left) @ torch.diag(s) @ polar(right).T


def iso_c(updates, rank, scale=None):
    scale = 1 / len(updates) if scale is None else scale
    u, s, vh = torch.linalg.svd(sum(updates), full_matrices=False)
    keep = [i for i in range(len(s)) if i < rank and s[i] > 1e-6 * s[0]]
    return scale * s[keep].mean() * u[:, keep] @ vh[keep]


def knots_basis(updates):
    """U, s and the list of V_n (Q, K) of the column concatenation."""
    u, s, vh = torch.linalg.svd(torch.cat(updates, 1), full_matrices=False)
    keep = s > 1e-6 * s[0]
    u, s, vh = u[:, keep], s[keep], vh[keep]
    return u, s, list(vh.split(updates[0].shape[1], dim=1))


def knots_matrices(updates):
    u, s, v = knots_basis(updates)
    return u, [torch.diag(s) @ vi for vi in v]


def knots_ties(updates, density=0.2, limits=None):
    u, c = knots_matrices(updates)
    return u @ ties(c, density, limits=limits)


def core_matrices(factors_b, factors_a, basis="factors"):
    """U, V and the core matrices; factors are lists of B (D, R), scaled, and A (R, K)."""
    updates = [b @ a for b, a in zip(factors_b, factors_a, strict=True)]
    if basis == "factors":
        left, right = torch.cat(factors_b, 1), torch.cat(factors_a, 0)
    else:
        left, right = torch.cat(updates, 1), torch.cat(updates, 0)
    u, s, _ = torch.linalg.svd(left, full_matrices=False)
    u = u[:, s > 1e-6 * s[0]]
    _, s, vh = torch.linalg.svd(right, full_matrices=False)
    vh = vh[s > 1e-6 * s[0]]
    return u, vh, [u.T @ d @ vh.T for d in updates]


def core_ties(factors_b, factors_a, density=1.0, basis="factors", limits=None):
    u, vh, cores = core_matrices(factors_b, factors_a, basis)
    return u @ ties(cores, density, limits=limits) @ vh


def seedft(updates):
    u, s, v = knots_basis(updates)
    return u @ torch.diag(s) @ polar(sum(v).T).T / len(updates) ** 0.5


def seedlora_subspace(updates, rank, quantile=0.9, z_merge="ties", z_density=1.0, p=0.5):
    stacked = torch.stack(updates)
    limit = top_magnitudes(stacked, 1 - quantile)
    u, _, vh = torch.linalg.svd(mean(updates), full_matrices=False)
    u, vh = u[:, :rank], vh[:rank]
    z = torch.stack([u.T @ d @ vh.T for d in updates])
    if z_merge == "ties":
        # the Z sum to a diagonal matrix: off the diagonal there is no sign to elect, unless the trim left one
        kept = torch.stack([x * (x.abs() >= top_magnitudes(x, z_density)) for x in z])
        drawn = kept.sum(0).abs() <= 1e-6 * kept.abs().sum(0)
        merged = ties(list(z), z_density).masked_fill(drawn, 0)
    else:
        merged = masked_mean(list(z), dare_masks(z.shape, p), p) if z_merge == "dare" else z.mean(0)
    out = u @ merged @ vh
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            large = [float(d[i, j]) for d in updates if abs(float(d[i, j])) >= limit]
            plus, minus = [x for x in large if x > 0], [x for x in large if x < 0]
            if not large:
                continue
            if len(plus) == len(minus):
                group = plus if sum(large) >= 0 else minus
            else:
                group = plus if len(plus) > len(minus) else minus
            out[i, j] = sum(group) / len(group)
    return out
