"""Compute the losses of a frozen head without keeping its logits: a few positions at a time.

Shape legend: ``S`` positions scored, ``H`` hidden size, ``V`` vocabulary, ``C`` positions of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, log_softmax

from seedlora.distributed.deepspeed_internals import is_partitioned_parameter

#: Logits that are held at once.
_CHUNK_LOGITS = 2**24


def chunk_rows(vocabulary: int) -> int:
    """Return how many positions have their logits held at once."""
    return max(1, _CHUNK_LOGITS // vocabulary)


def is_frozen_matrix(head: nn.Module) -> bool:
    """Return whether the head is one frozen matrix without an adapter, which no strategy keeps in parts."""
    return (
        type(head) is nn.Linear
        and not head.weight.requires_grad
        and type(head.weight) is nn.Parameter
        # ZeRO-3's weights are whole now and then, which the ranks must not take for a different way each
        and not is_partitioned_parameter(head.weight)
        and (head.weight.numel() == head.in_features * head.out_features)
    )


def head_losses(
    hidden: Float[Tensor, "S H"], head: nn.Linear, targets: Int[Tensor, " S"], *, greedy: bool
) -> tuple[Float[Tensor, " S"], Int[Tensor, " S"] | None]:
    r"""Return the negative log-likelihood of the targets, :math:`-\log \mathrm{softmax}(W h + b)_y`, in float32.

    The head is frozen, so its backward is known in the forward: a position's gradient is
    :math:`g \, W^\top (\mathrm{softmax}(W h + b) - e_y)` with a single number ``g`` from behind. It is computed chunk
    by chunk while the chunk's logits are at hand, and ``(S, H)`` numbers are kept for the backward instead of several
    times ``(S, V)``.

    Costs two products ``(S, H, V)``, one without gradient, and 10 bytes per logit of one chunk in bfloat16.

    Args:
        hidden: what the head sees.
        head: as :func:`is_frozen_matrix` wants it.
        targets: token ids.
        greedy: whether to tell which token is the most likely.

    Returns:
        The losses, and if ``greedy`` the first among the most likely tokens at each position.
    """
    losses, likely = _HeadLosses.apply(hidden, head.weight, head.bias, targets, greedy)
    return losses, likely if greedy else None


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, greedy: bool
    ) -> tuple[Tensor, Tensor]:
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        likely = targets.new_empty(len(targets) if greedy else 0)
        step = chunk_rows(len(weight))
        for start in range(0, len(hidden), step):
            part = slice(start, start + step)
            logits, y = linear(hidden[part], weight, bias), targets[part, None]
            if greedy:
                likely[part] = logits.argmax(-1)
            log_p = log_softmax(logits, -1, dtype=torch.float32)
            del logits
            losses[part] = -log_p.gather(1, y)[:, 0]
            if gradient is not None:
                p = log_p.exp_()
                p.scatter_add_(1, y, p.new_full(y.shape, -1.0))
                torch.mm(p.to(weight.dtype), weight, out=gradient[part])
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(likely)
        return losses, likely

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_losses: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * of_losses[:, None]).to(gradient.dtype), None, None, None, None
