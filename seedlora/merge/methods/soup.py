"""Model soups (Wortsman et al., ICML 2022): uniform and greedy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from seedlora.merge.steps.walk import Walk
from seedlora.updates.algebra import checked_weights, weighted_sum
from seedlora.updates.dense import AnyUpdates
from seedlora.updates.factors import LoRAFactors


def soup(stack: AnyUpdates, *, weights: Float[Tensor, " N"] | list[float] | None = None) -> AnyUpdates:
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

    Example:
        >>> import torch
        >>> from seedlora import LoRAFactors
        >>> stack = LoRAFactors(A=torch.tensor([[[4.0, 1, 0]], [[2.0, -3, 1]]]), B=torch.ones(2, 1, 1))
        >>> soup(stack).dense()
        tensor([[[ 3.0000, -1.0000,  0.5000]]])
        >>> soup(stack).rank
        2
    """
    return weighted_sum(stack, checked_weights(stack, weights) / len(stack))


def greedy_soup(stack: LoRAFactors, *, members: Sequence[int]) -> LoRAFactors:
    """Average the chosen adapters alone.

    Args:
        stack: the adapters of one layer.
        members: their indices, as :func:`greedy_members` chooses them for the whole model.

    Returns:
        One adapter of rank ``len(members) * R``, in the dtypes of ``stack``.

    Raises:
        ValueError: if ``members`` is empty, has a duplicate, or an index that is not in the stack.

    References:
        Wortsman et al., "Model soups", ICML 2022, arXiv 2203.05482, recipe 1.

    Example:
        >>> import torch
        >>> from seedlora import LoRAFactors
        >>> stack = LoRAFactors(A=torch.tensor([[[4.0, 1, 0]], [[2.0, -3, 1]]]), B=torch.ones(2, 1, 1))
        >>> greedy_soup(stack, members=[1]).dense()
        tensor([[[ 2., -3.,  1.]]])
    """
    chosen = list(members)
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(len(stack))):
        raise ValueError(f"members must be different indices from 0 to {len(stack) - 1}, at least one, got {chosen}")
    return soup(LoRAFactors(stack.A[chosen], stack.B[chosen]))


def greedy_members(walk: Walk, *, score: Callable[[Mapping[str, LoRAFactors]], float]) -> list[int]:
    """Choose the members of a greedy soup: sorted by their own score, each is kept if the soup does not get worse.

    Costs at most ``2 * N - 1`` calls of ``score``, and one fused copy of the model's factors at a time.

    Reading taken: an addition that leaves the score unchanged is kept, as in the paper's recipe.

    Args:
        walk: all layers.
        score: of a fused adapter (one adapter per layer path) on validation data, larger is better.

    Returns:
        Indices in the order in which they were added.

    Raises:
        ValueError: if ``score`` returns no finite number.
    """
    count = len(next(iter(walk()))[1])
    return greedy_search(
        count, lambda members: score({path: greedy_soup(stack, members=members) for path, stack in walk()})
    )


def greedy_search(count: int, score: Callable[[Sequence[int]], float]) -> list[int]:
    """Choose members as :func:`greedy_members` does, by a score of the members of a soup of ``count`` adapters."""

    def scored(members: Sequence[int]) -> float:
        value = float(score(members))
        if not torch.tensor(value).isfinite():
            raise ValueError(f"score must return a finite number, got {value} for the soup of {list(members)}")
        return value

    alone = [scored([i]) for i in range(count)]
    order = sorted(range(count), key=lambda i: -alone[i])
    members, best = order[:1], alone[order[0]]
    for i in order[1:]:
        if (value := scored([*members, i])) >= best:
            members, best = [*members, i], value
    return members
