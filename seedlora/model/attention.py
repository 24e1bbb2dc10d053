"""Choose how a base model computes its attention, and keep rows apart that follow each other in one row of a batch.

transformers calls whatever is registered by a name. :data:`DOCUMENTS` is such a name: its function gets one row that
holds many documents, and their lengths, and computes causal attention within each. It makes no (T, T) mask, of which
most would be masked: documents of 180 tokens in a row of 4,000 have a twentieth of its pairs.

Shape legend: ``M`` rows, ``T`` tokens of each, ``H`` heads of the queries, ``G`` of keys and values, ``K`` features of
a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, wraps
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from seedlora.model.block_attention import block_attention
from seedlora.utils.options import name_option
from seedlora.utils.transformers_internals import attention_implementation, supports_attention

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

#: The name under which transformers finds :func:`documents_attention`.
DOCUMENTS = "seedlora_documents"
AUTO = "auto"
#: What ``model.attention`` may be; ``auto`` is sdpa, and for short rows on a CPU eager.
ATTENTIONS = (AUTO, "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
#: Families that hand the lengths of documents on to their attention, and have nothing else that looks at earlier
#: tokens. Each is compared with its documents one by one in ``tests/model/test_attention.py``.
KEEPS_DOCUMENTS_APART = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "olmo2", "granite", "smollm3", "starcoder2"}
)
#: Arguments of a model by which its tokens see others than those before them in their row.
_SEEN_BESIDE = ("attention_mask", "past_key_values", "position_ids")
#: Tokens up to which a row is short for `attention_kernel`.
_SHORT_ROW = 256


@dataclass(frozen=True)
class Documents:
    """Say where the documents of a row end.

    Args:
        lengths: tokens of each, in their order.
        device: of the row.
    """

    lengths: tuple[int, ...]
    device: torch.device

    @property
    def longest(self) -> int:
        """Return the tokens of the longest document."""
        return max(self.lengths)

    @cached_property
    def edges(self) -> Int[Tensor, " documents+1"]:
        """Return where each document begins, and the end of the last: made once for all layers of a forward."""
        ends = torch.tensor((0, *self.lengths)).cumsum(0)
        return ends.to(torch.int32).to(self.device, non_blocking=True)

    @cached_property
    def padded(self) -> Padding:
        """Return the places of the documents' tokens in a batch that has a row for each."""
        lengths = torch.tensor(self.lengths)
        place = torch.arange(self.longest)
        real = place < lengths[:, None]
        begins = (lengths.cumsum(0) - lengths)[:, None]
        source = (begins + place).where(real, begins)
        return Padding(source.flatten().to(self.device), real.flatten().nonzero()[:, 0].to(self.device))


@dataclass(frozen=True)
class Padding:
    """Hold the way between one row of documents and a batch of padded ones.

    Args:
        source: of each place in the batch the token in the row; for padding the first of its document.
        real: of each token of the row its place in the batch.
    """

    source: Int[Tensor, " padded"]
    real: Int[Tensor, " T"]


@dataclass(frozen=True)
class SharedPrefix:
    """Say that each row holds the tokens that documents begin with, once, and then what follows them in each.

    Args:
        tokens: that the documents begin with.
        documents: of a row, all of one length.
    """

    tokens: int
    documents: int


def documents_attention(
    module: nn.Module,  # noqa: ARG001 - transformers gives it
    query: Float[Tensor, "M H T K"],
    key: Float[Tensor, "M G T K"],
    value: Float[Tensor, "M G T K"],
    attention_mask: Tensor | None,  # noqa: ARG001 - transformers gives it
    *,
    documents: Documents | SharedPrefix | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[Float[Tensor, "M T H K"], None]:
    """Compute causal attention within each document; transformers calls it under :data:`DOCUMENTS`.

    On a CPU it is that of :mod:`seedlora.model.block_attention`. On a GPU in 16 bits torch's kernel for rows of any
    lengths takes all documents at once; elsewhere they are padded, for the attention alone.

    Args:
        module: the attention layer.
        query: of the rows.
        key: of the rows.
        value: of the rows.
        attention_mask: none: transformers makes none for a name that has no masks.
        documents: that are in the row, if there is one, or in each; default: each row is one.
        scaling: of the scores; default ``K ** -0.5``.
        sliding_window: the most tokens that one sees, itself among them; default all.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = _under_autocast(query, key, value)
    if isinstance(documents, SharedPrefix):
        return after_prefix(query, key, value, documents, scaling, sliding_window), None
    rows, longest = len(query), query.shape[2] if documents is None else documents.longest
    window = sliding_window if sliding_window is not None and sliding_window < longest else None
    if query.device.type == "cpu" and not torch.compiler.is_compiling():
        lengths = (longest,) if documents is None else documents.lengths
        out = [
            block_attention(query[i], key[i], value[i], lengths, scaling=scaling, window=window).transpose(0, 1)
            for i in range(rows)
        ]
        return out[0][None] if rows == 1 else torch.stack(out), None
    if documents is None:
        return _causal(query, key, value, scaling, window).transpose(1, 2), None
    if query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16):
        return by_varlen_kernel(query, key, value, documents, scaling, window), None
    return padded(query, key, value, documents, scaling, window), None


def _under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors in autocast's dtype where it is on, as it does for torch's own attention.

    Rotated queries and keys are in float32 there, and values are not.
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


def by_varlen_kernel(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scaling: float, window: int | None
) -> Tensor:
    """Compute the attention of all documents by torch's kernel for rows of any lengths, on a GPU in 16 bits."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
    edges, longest = documents.edges, documents.longest
    seen = (-1 if window is None else window - 1, 0)
    out = varlen_attn(
        q, k, v, edges, edges, longest, longest, scale=scaling, window_size=seen, enable_gqa=q.shape[1] != k.shape[1]
    )
    assert isinstance(out, Tensor)
    return out[None]


def padded(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scaling: float, window: int | None
) -> Tensor:
    """Compute the attention of all documents as a batch that is padded to the longest."""
    places, n = documents.padded, len(documents.lengths)

    def batch(row: Tensor) -> Tensor:
        return row[0].transpose(0, 1)[places.source].unflatten(0, (n, -1)).transpose(1, 2)

    out = _causal(batch(query), batch(key), batch(value), scaling, window)
    return out.transpose(1, 2).flatten(0, 1)[places.real][None]


def after_prefix(
    query: Tensor, key: Tensor, value: Tensor, documents: SharedPrefix, scaling: float, window: int | None
) -> Tensor:
    """Compute the attention of a prefix, and of what follows it in each document.

    The prefix meets the keys of a whole document too, though it sees none but its own: sums over as many numbers are
    rounded as they are where each document is whole, and so the same bits come out.
    """
    p, n = documents.tokens, documents.documents

    def rest(x: Tensor) -> Tensor:
        return x[:, :, p:].unflatten(2, (n, -1)).transpose(1, 2).flatten(0, 1)

    def whole(x: Tensor) -> Tensor:
        prefix = x[:, None, :, :p].expand(-1, n, -1, -1, -1).flatten(0, 1)
        return torch.cat([prefix, rest(x)], dim=2)

    keys, values = whole(key), whole(value)
    first = _with_mask(query[:, :, :p], keys[::n], values[::n], 0, scaling, window)
    out = _with_mask(rest(query), keys, values, p, scaling, window)
    out = out.unflatten(0, (-1, n)).transpose(1, 2).flatten(2, 3)
    return torch.cat([first, out], dim=2).transpose(1, 2)


def _with_mask(q: Tensor, k: Tensor, v: Tensor, before: int, scaling: float, window: int | None) -> Tensor:
    """Compute causal attention of queries that have so many tokens before them; short rows on a CPU as ``eager``."""
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(before)
    if window is not None:
        seen = seen.triu(before - window + 1)
    if attention_kernel(q.device, k.shape[2]) != "eager":
        return scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (torch.matmul(q, k.mT) * scaling).masked_fill_(~seen, torch.finfo(q.dtype).min)
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return torch.matmul(weights, v)


def _causal(q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None) -> Tensor:
    tokens, grouped = q.shape[2], q.shape[1] != k.shape[1]
    if window is None or tokens <= window:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril().triu(1 - window)
    return scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scaling, enable_gqa=grouped)


def reason_not_to_pack(config: PretrainedConfig, attention: str, *, compiled: bool) -> str | None:
    """Say why documents cannot follow each other in a row without padding; None if they can.

    Args:
        config: of the language model.
        attention: one of :data:`ATTENTIONS`.
        compiled: whether layers are compiled.
    """
    if config.model_type not in KEEPS_DOCUMENTS_APART:
        return f"nobody has tested that models of type {config.model_type} keep packed rows apart"
    if attention not in (AUTO, "sdpa", "eager"):
        return f"{attention} is asked for, and packed rows have an attention of their own"
    return "compiled layers take rows of few shapes" if compiled else None


def check_attention(attention: str, config: PretrainedConfig, dtype: torch.dtype) -> None:
    """Check that a model can have the attention asked for, before it is loaded.

    Raises:
        ValueError: if what it needs is not there.
    """
    option = name_option("model.attention", attention)
    if attention == AUTO:
        return
    if attention.startswith("flash"):
        from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

        there = is_flash_attn_2_available() if attention.endswith("2") else is_flash_attn_3_available()
        if not there:
            raise ValueError(
                f"{option} needs the package flash-attn and a GPU that it supports, which are not both here; sdpa "
                "takes torch's own kernels"
            )
        if dtype == torch.float32:
            raise ValueError(
                f"{option} computes in 16 bits, and the base model is in float32; give "
                f"{name_option('model.dtype', 'bfloat16')}"
            )
    if not supports_attention(config, attention):
        raise ValueError(f"{option}: transformers has no such attention for models of type {config.model_type}")


def attention_kernel(device: torch.device, tokens: int) -> str:
    """Return the attention for bfloat16 rows without a mask: ``eager`` for short ones on a CPU, :data:`DOCUMENTS` for
    long ones there, ``sdpa`` otherwise.

    PyTorch's fused CPU kernel spends 27 ms where the plain products take 5 in a bfloat16 backward over 12 rows of 29
    tokens, which is over a quarter of a training step. From 256 tokens the plain products' matrices of scores leave
    the processor's caches, and those of blocks take less time than either and no memory. A single token, in
    generation, has no backward, and grouped heads in the fused kernel without copies: 6 ms against 55 for 80 rows over
    250 tokens.
    """
    if device.type != "cpu" or tokens == 1:
        return "sdpa"
    return "eager" if tokens <= _SHORT_ROW else DOCUMENTS


def choose_attention(model: PreTrainedModel, dtype: torch.dtype, attention: str) -> None:
    """Have a model choose its attention anew in every forward: by its documents, or else by device and length.

    The decoder's forward is replaced, not hooked: DeepSpeed removes all hooks of a model when an engine ends.

    Args:
        model: as it was loaded, with the attention that it has where nothing is to choose.
        dtype: of its weights.
        attention: one of :data:`ATTENTIONS`.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(DOCUMENTS, documents_attention)
    own = attention_implementation(model.config)
    # Families with an attention of their own (Gemma 2 caps its scores) keep it.
    keeps_apart = model.config.model_type in KEEPS_DOCUMENTS_APART
    by_length = attention == AUTO and dtype == torch.bfloat16 and own == "sdpa"

    decoder = model.base_model
    forward = decoder.forward

    @wraps(forward)
    def choosing(*args: object, **kwargs: object) -> object:
        wanted = own
        if kwargs.get("documents") is not None:
            wanted = DOCUMENTS
        elif by_length:
            given = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
            inputs = next(tensor for tensor in given if isinstance(tensor, Tensor))
            wanted = attention_kernel(inputs.device, inputs.shape[1])
            beside = kwargs.get("use_cache") or any(kwargs.get(name) is not None for name in _SEEN_BESIDE)
            if wanted == DOCUMENTS and (beside or not keeps_apart):
                wanted = own
        if attention_implementation(decoder.config) != wanted:
            decoder.set_attn_implementation(wanted)
        return forward(*args, **kwargs)

    decoder.forward = choosing
