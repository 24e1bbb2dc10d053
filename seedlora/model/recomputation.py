"""Recompute activations in the backward pass instead of keeping them: of whole layers, or the cheap ones."""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    create_selective_checkpoint_contexts,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from torch._ops import OpOverload

#: What is recomputed: nothing; norms, activations and sums; or whole decoder layers.
RECOMPUTATIONS = NOTHING, SELECTIVE, WHOLE_LAYERS = ("none", "selective", "full")


def recomputation(value: bool | str) -> str:
    """Return what is recomputed; ``true`` and ``false``, as older files have it, are ``full`` and ``none``."""
    return value if isinstance(value, str) else WHOLE_LAYERS if value else NOTHING


def recompute_activations(model: PeftModel, which: str) -> None:
    """Let the decoder layers of a model recompute in the backward pass what is not kept of them.

    ``full`` keeps the input of each layer and does all of its forward once more: 6 operations per frozen weight and
    token in the place of 4. ``selective`` keeps besides what took the operations, the results of linear layers and of
    attention, and recomputes what lies between them, at no further product with a frozen weight.

    The kept results must not be written to: whoever adds to them makes a new tensor.
    """
    if which == NOTHING:
        return
    options: dict[str, object] = {"use_reentrant": False}
    if which == WHOLE_LAYERS:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(options)
    else:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
        model.gradient_checkpointing_enable(options)
        # transformers asks for the gradient of the embedding, which nobody uses.
        model.disable_input_require_grads()


@cache
def _is_product(operation: OpOverload) -> bool:
    """Tell whether an operation is a linear layer without bias, in whatever bits, or a kernel of attention."""
    name = operation.name()
    return name in ("aten::mm", "bitsandbytes::gemm_4bit") or "attention" in name or "attn" in name


def _keep_products(
    context: SelectiveCheckpointContext,  # noqa: ARG001 - torch calls it so
    operation: OpOverload,
    *arguments: object,
    **_: object,
) -> CheckpointPolicy:
    """Keep the results of linear layers and of attention kernels.

    A product with a bias is told from an adapter's, which adds to a matrix, by the shape of what it is added to. The
    scores of an attention without a kernel are recomputed: they are larger than all else and quickly made.
    """
    kept = _is_product(operation)
    if operation is torch.ops.aten.addmm.default:
        added = arguments[0]
        kept = isinstance(added, Tensor) and added.ndim == 1
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
