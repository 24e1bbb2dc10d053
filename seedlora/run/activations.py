"""Estimate what a training step keeps of a forward for its backward pass, from the shapes of the decoder layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from seedlora.model.attention import AUTO, attention_kernel
from seedlora.model.head_losses import chunk_rows
from seedlora.model.recomputation import NOTHING, SELECTIVE
from seedlora.training.model_options import ModelOptions


@dataclass(frozen=True)
class DecoderShape:
    """Hold the sizes of a decoder, those of one of its layers where they are not of the whole.

    Args:
        layers: how many.
        hidden: size of a hidden state.
        intermediate: size inside the feed-forward block.
        heads: of attention.
        queries: features of all heads' queries together.
        keys: the same of keys.
        outputs: of the linear layers together.
        vocabulary: tokens that are told apart.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    queries: int
    keys: int
    outputs: int
    vocabulary: int


class AttentionBytes(NamedTuple):
    """Hold the bytes of attention for one token in one layer.

    Attributes:
        kept: for the backward pass, beside queries, keys, values and result.
        result: of a kernel, which selective recomputation keeps.
        passing: that a backward pass takes for a while.
        mask: for one token in all layers together.
    """

    kept: int
    result: int
    passing: int
    mask: int


def decoder_shape(options: ModelOptions) -> DecoderShape:
    """Return the sizes of a base model's decoder, by its configuration and its linear layers."""
    model, config = options.outline, options.outline.text_config
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return DecoderShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        heads=heads,
        queries=heads * width,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * width,
        outputs=sum(d for d, _ in model.linear.values()) // config.num_hidden_layers,
        vocabulary=config.vocab_size,
    )


def attention_bytes(
    options: ModelOptions, length: int, *, masked: bool, device: torch.device, joined: bool = False
) -> AttentionBytes:
    """Return what attention takes on this device.

    Plain products keep their scores in the model's dtype and in float32. A kernel keeps one number per head; under a
    mask it keeps the mask too, once more in every layer, in the model's dtype. Plain products and masks need the keys
    and values of grouped heads repeated.

    Args:
        options: of the model.
        length: tokens of a row.
        masked: rows hold several samples, which a mask tells apart.
        device: that trains.
        joined: the row holds several samples, which the kernel takes one by one.
    """
    shape, width = decoder_shape(options), options.base_dtype.itemsize
    repeated = 2 * width * (shape.queries - shape.keys)
    kernel = options.attention
    if kernel == AUTO and options.base_dtype == torch.bfloat16:
        kernel = attention_kernel(device, length)
    if kernel == "eager" and not joined:
        scores = shape.heads * length
        return AttentionBytes(scores * (width + 4) + repeated, 0, scores * (2 * width + 8), length * width)
    result = width * shape.queries + 4 * shape.heads
    if masked:
        return AttentionBytes(4 * shape.heads + length * width + repeated, result, 0, length)
    return AttentionBytes(4 * shape.heads, result, 0, 0)


def activation_bytes(
    shape: DecoderShape,
    attention: AttentionBytes,
    *,
    tokens: int,
    supervised: int,
    width: int,
    recomputed: str = NOTHING,
    columns: int = 0,
    rescaled: int = 0,
    all_logits: bool = False,
) -> int:
    """Estimate the most bytes of activations that a forward and backward hold at once.

    A Llama-like layer keeps for each token ``width * (2 h + 2 q + 2 k + 4 f) + 8 h``: the inputs of the adapters,
    queries, keys, values and what comes out of attention, the feed-forward's parts, and the two norms' float32. With
    everything recomputed it keeps its input, with selective recomputation also the results of its linear layers and of
    attention; one layer at a time is then whole in the backward pass. That pass takes the gradients of a feed-forward
    block beside, ``width * (2 h + 2 f)``, when the logits are gone.

    For each supervised token there are two hidden states; for those of one chunk
    (:func:`seedlora.model.head_losses.chunk_rows`) the logits in the model's dtype and twice in float32. A head that
    is trained, held in parts, or followed by something else takes all logits at once: ``2 * width + 12`` for each.

    Args:
        shape: of the decoder.
        attention: what it takes.
        tokens: of the forward, padding included.
        supervised: of these, scored.
        width: bytes of a number of the base model.
        recomputed: of :data:`seedlora.model.recomputation.RECOMPUTATIONS`.
        columns: ranks of all replicas' adapters in one layer together.
        rescaled: outputs of DoRA's layers in one layer, which are kept before they are rescaled.
        all_logits: the head takes all positions at once.
    """
    hidden, inner = shape.hidden, shape.intermediate
    layer = width * (2 * hidden + 2 * shape.queries + 2 * shape.keys + 4 * inner + columns + rescaled) + 8 * hidden
    layer += attention.kept
    products = width * (shape.outputs + columns) + attention.result
    entry = width * hidden
    passing = width * (2 * hidden + 2 * inner) + attention.passing
    if recomputed == NOTHING:
        kept = shape.layers * layer
    elif recomputed == SELECTIVE:
        # What is kept of the layer at hand is let go as the layer becomes whole.
        kept = shape.layers * (entry + products)
        passing += max(layer - products, 0)
    else:
        kept = shape.layers * entry
        passing += layer
    ends = 2 * entry + 4 * hidden + attention.mask
    logits = min(supervised, chunk_rows(shape.vocabulary)) * shape.vocabulary * (width + 8)
    if all_logits:
        logits = supervised * shape.vocabulary * (2 * width + 12)
    return tokens * (kept + ends) + supervised * hidden * 2 * width + max(logits, tokens * passing)
