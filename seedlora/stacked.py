"""The stacked forward: several LoRA adapters of one PEFT model at once, each on its own block of rows.

Shape legend: ``N`` adapters routed, ``M`` rows of the batch (``N`` equal blocks), ``T`` tokens, ``K`` input and ``D``
output features, ``R`` the ranks of the routed adapters together.

Of a PEFT layer only ``forward`` is replaced. The frozen base layer sees all rows in one product; the adapters are two
more products with ``R`` columns::

    h = (x [A_1; ...; A_N]^T) * blocks        # blocks zeroes what belongs to another adapter, and scales
    y = base(x) + h [B_1 ... B_N]^T
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from seedlora.factors import LoRAFactors
from seedlora.strategies import whole
from seedlora.streams import stream_seed

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer


class _Joined(NamedTuple):
    """The routed adapters of one layer side by side: A (R, K), B (D, R), the ranks and scalings of the blocks."""

    A: Tensor
    B: Tensor
    ranks: tuple[int, ...]
    scales: tuple[float, ...]


@dataclass
class _Route:
    """Who computes what in the next forward; shared by all layers of one model."""

    names: tuple[str | None, ...] = ()
    lengths: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    dropout_keys: tuple[tuple[int, ...], ...] | None = None
    loaded: dict[str, dict[str, LoRAFactors]] = field(default_factory=dict)
    blocks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)
    joined: dict[str, _Joined] | None = None


class AdapterStack:
    """Routes blocks of rows through the adapters of ``model``.

    The first ``M / N`` rows of every forward go through the first name routed, the next through the second, and so on.
    An adapter is a PEFT adapter of the model (trainable or not), one put here by :meth:`load`, or ``None`` for the
    base model alone.

    The route stays until it is changed, also through a backward that recomputes the forward (gradient checkpointing).

    Args:
        model: a PEFT model whose LoRA layers are linear, without DoRA or bias.

    Raises:
        ValueError: if a layer of another kind carries an adapter.
    """

    def __init__(self, model: PeftModel) -> None:
        from peft.tuners.lora import LoraLayer

        self.model = model
        self._route = _Route()
        self.layers: dict[str, LoraLayer] = {}
        prefix = len("base_model.model.")
        for name, layer in model.named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            path = name[prefix:]
            if layer.lora_embedding_A or any(layer.use_dora.values()) or any(layer.lora_bias.values()):
                raise ValueError(
                    f"layer {path} carries an adapter that cannot be stacked: plain LoRA on linear layers is, "
                    "DoRA, embeddings and lora_bias are not"
                )
            self.layers[path] = layer
            vars(layer).update(stack_path=path, stack_index=len(self.layers), stack_route=self._route)
            vars(layer)["forward"] = MethodType(_stacked_forward, layer)

    def route(
        self,
        names: Sequence[str | None],
        *,
        lengths: Sequence[int] = (),
        rows: Sequence[int] = (),
        dropout_keys: Sequence[tuple[int, ...]] | None = None,
    ) -> None:
        """Choose the adapters of the next forwards, one per block of rows.

        Args:
            names: one adapter per block, ``None`` for the base model.
            lengths: tokens of each block before it was padded to the length of the stack; only dropout needs them.
            rows: rows of each block before it was filled up to the size of the others; only dropout needs them.
            dropout_keys: one tuple of integers per block, for example (seed, epoch, batch). The adapter's dropout is a
                pure function of it and of the layer, so that an adapter drops the same entries whether it is trained
                alone or in a stack, before or after a resume. ``None`` switches dropout off.

        Raises:
            KeyError: for a name that is neither in the model nor loaded.
        """
        for name in names:
            if name is not None and name not in self._route.loaded and name not in self.model.peft_config:
                known = [*self.model.peft_config, *self._route.loaded]
                raise KeyError(f"no adapter '{name}' in this stack; there are {', '.join(known) or 'none'}")
        self._route.names = tuple(names)
        self._route.lengths, self._route.rows = tuple(lengths), tuple(rows)
        self._route.joined = None if self._route.joined is None else {}
        self._route.dropout_keys = None if dropout_keys is None else tuple(dropout_keys)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, no adapter changes: a layer joins and casts its adapters once per route, not in every forward.

        For generation, whose forwards are so small that this would cost as much as they do.
        """
        self._route.joined = {}
        try:
            yield
        finally:
            self._route.joined = None

    def load(self, name: str, layers: Mapping[str, LoRAFactors]) -> None:
        """Put an adapter beside the model's own, for evaluation: a fused one, for example.

        It replaces a loaded adapter of the same name, takes no part in training and is in no ``state_dict``.

        Args:
            name: how :meth:`route` will call it.
            layers: one adapter (``N = 1``) per layer path; layers left out keep the base weights.
        """
        self._route.loaded[name] = {
            path: factors.to(self.layers[path].get_base_layer().weight.device) for path, factors in layers.items()
        }

    def unload(self, name: str) -> None:
        """Forget an adapter that :meth:`load` put here."""
        del self._route.loaded[name]

    def loaded_sha256(self, name: str) -> str:
        """Of the weights of an adapter that :meth:`load` put here."""
        digest = hashlib.sha256()
        for path, factors in sorted(self._route.loaded[name].items()):
            digest.update(path.encode())
            for tensor in (factors.A, factors.B):
                digest.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def factors(self, names: Sequence[str]) -> dict[str, LoRAFactors]:
        """The current updates of PEFT adapters: per layer a stack in float32, detached. All ranks must call it."""
        return {
            path: LoRAFactors.stack([_factors(layer, name) for name in names]) for path, layer in self.layers.items()
        }

    def stored(self, name: str) -> dict[str, LoRAFactors]:
        """One PEFT adapter as its file holds it: ``B`` without the scaling; detached. All ranks must call it."""
        weights = {path: (layer.lora_A[name].weight, layer.lora_B[name].weight) for path, layer in self.layers.items()}
        return {path: LoRAFactors(*(whole(w)[None] for w in pair)) for path, pair in weights.items()}

    def is_finite(self, name: str) -> bool:
        """Whether no weight of a PEFT adapter is NaN or infinite. All ranks must call it."""
        return all(bool(whole(parameter).isfinite().all()) for parameter in self.parameters(name))

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The parameters of one PEFT adapter, layer by layer: A, then B."""
        return [module[name].weight for layer in self.layers.values() for module in (layer.lora_A, layer.lora_B)]


def _factors(layer: LoraLayer, name: str) -> LoRAFactors:
    a, b = whole(layer.lora_A[name].weight), whole(layer.lora_B[name].weight)
    return LoRAFactors(a.float()[None], (b.float() * layer.scaling[name])[None])


def _stacked_forward(self: LoraLayer, x_MTK: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    route: _Route = self.stack_route
    n, shape = len(route.names), x_MTK.shape
    if n == 0 or shape[0] % n:
        raise RuntimeError(f"{shape[0]} rows cannot be split into blocks for {n} routed adapters")
    x = x_MTK.reshape(-1, shape[-1])
    # Two dimensions, so that y is no view: autograd then lets the adapters add to it in place.
    y = self.base_layer(x, *args, **kwargs)
    a_RK, b_DR, ranks, scales = _joined(self, y)
    if not sum(ranks):
        return y.view(*shape[:-1], -1)
    x = x.to(y.dtype)
    if route.dropout_keys is not None:
        x = _dropout(self, x.view(shape), route).view(x.shape)
    h = torch.mm(x, a_RK.t())
    h = (h.view(n, -1, sum(ranks)) * _blocks(route, ranks, scales, y)).view(h.shape)
    return y.addmm_(h, b_DR.t()).view(*shape[:-1], -1)


def _joined(layer: LoraLayer, like: Tensor) -> _Joined:
    """The adapters routed, in the dtype of ``like``; kept while the stack is frozen."""
    route: _Route = layer.stack_route
    if route.joined is not None and layer.stack_path in route.joined:
        return route.joined[layer.stack_path]
    parts = [_block(layer, name) for name in route.names]
    found = [part for part in parts if part is not None] or [(like[:0, :0], like[:0, :0], 0.0)]
    joined = _Joined(
        torch.cat([a for a, _, _ in found]).to(like.dtype),
        torch.cat([b for _, b, _ in found], dim=1).to(like.dtype),
        tuple(0 if part is None else part[0].shape[0] for part in parts),
        tuple(0.0 if part is None else part[2] for part in parts),
    )
    if route.joined is not None:
        route.joined[layer.stack_path] = joined
    return joined


def _block(layer: LoraLayer, name: str | None) -> tuple[Tensor, Tensor, float] | None:
    """A of shape (r, K), B of shape (D, r) and the scaling that one block of rows uses in this layer."""
    if name is None:
        return None
    if (loaded := layer.stack_route.loaded.get(name)) is not None:
        factors = loaded.get(layer.stack_path)
        return None if factors is None else (factors.A[0], factors.B[0], 1.0)
    if name not in layer.lora_A:
        return None
    return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]


def _blocks(route: _Route, ranks: tuple[int, ...], scales: tuple[float, ...], like: Tensor) -> Tensor:
    """Shape (N, 1, R): the scaling on each block's own columns, zero elsewhere. Built once per kind of layer."""
    key = (ranks, scales, like.device, like.dtype)
    if key not in route.blocks:
        # Training uses it too, which takes no tensor made in inference mode.
        with torch.inference_mode(False):
            rows = [torch.full((1, r), s) for r, s in zip(ranks, scales, strict=True)]
            route.blocks[key] = torch.block_diag(*rows).unsqueeze(1).to(device=like.device, dtype=like.dtype)
    return route.blocks[key]


def _dropout(layer: LoraLayer, x_MTK: Tensor, route: _Route) -> Tensor:
    """Inverted dropout per block, each from its own stream and over its own rows and length."""
    assert route.dropout_keys is not None
    keep = torch.ones_like(x_MTK)
    rows = x_MTK.shape[0] // len(route.names)
    for i, (name, key) in enumerate(zip(route.names, route.dropout_keys, strict=True)):
        p = getattr(layer.lora_dropout[name], "p", 0.0) if name in layer.lora_dropout else 0.0
        if p:
            generator = torch.Generator(x_MTK.device).manual_seed(stream_seed(*key, layer.stack_index))
            own = route.rows[i] if route.rows else rows
            block = keep[i * rows : i * rows + own, : route.lengths[i] if route.lengths else None]
            draw = torch.empty(block.shape, device=x_MTK.device).bernoulli_(1 - p, generator=generator)
            block.copy_(draw.div_(1 - p))
    return x_MTK * keep
