"""Compute the forward of one layer with the adapters of all replicas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from seedlora.adapters.blockwise_update import LONG_BLOCK, BlockwiseUpdate
from seedlora.model.quantization import dequantized_weight
from seedlora.utils.random_streams import stream_seed

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper


class StartFactors(NamedTuple):
    """The factors at which all replicas of a layer start: A (r, K) and B (D, r), without the scaling.

    ``frozen_block_of`` says whose rows have them as a frozen block too: ``own``, subtracted, those of the replicas,
    because the base layer holds W; ``others``, added, all others, because it holds ``W - s B A``; or ``none``.
    """

    A: Tensor
    B: Tensor
    frozen_block_of: str


class Block(NamedTuple):
    """The adapter of one block of rows in one layer: A (r, K), B (D, r), the scaling, and DoRA's magnitudes (D)."""

    A: Tensor
    B: Tensor
    scale: float
    magnitude: Tensor | None = None


class JoinedBlocks(NamedTuple):
    """The routed adapters of one layer side by side: A (R, K), B (D, R), the ranks and scalings of the blocks.

    ``gain``, of shape (N, 1, D), is DoRA's factor on the outputs, less 1: near 1 it would lose bits in bfloat16.
    """

    A: Tensor
    B: Tensor
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    gain: Tensor | None


@dataclass
class Route:
    """States which adapter computes what in the next forward; shared by all layers of one model."""

    names: tuple[str | None, ...] = ()
    lengths: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    #: Of each block, where the forward has one row that holds them all; empty where each has rows of its own.
    tokens: tuple[int, ...] = ()
    dropout_keys: tuple[tuple[int, ...], ...] | None = None
    #: Rows of the forward at hand.
    batch: int = 0
    #: Of each block, the positions that the head sees; empty if it sees all.
    kept: tuple[int, ...] = ()
    loaded: dict[str, dict[str, Block]] = field(default_factory=dict)
    #: Full weights of the loaded adapters, by path and by the name within the module.
    weights: dict[str, dict[str, dict[str, Tensor]]] = field(default_factory=dict)
    blocks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)
    joined: dict[str, JoinedBlocks] | None = None
    #: The results of base layers are kept as they are, for a backward pass that recomputes the rest.
    keeps_products: bool = False

    def split(self, x: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
        """Divide a tensor into the blocks, along its rows, or along its tokens where there is one row."""
        return x.split(list(self.tokens) or x.shape[dim] // len(self.names), dim=dim)


def full_module_forward(self: ModulesToSaveWrapper, x: Tensor) -> Tensor:
    """Run a module that is trained in full: each block of rows goes through it with the weights of its own adapter."""
    route: Route = self.stack_route
    own, n, rows = [_full_weights_of(self, name) for name in route.names], len(route.names), len(x)

    def run_with(weights: dict[str, Tensor] | None, x: Tensor) -> Tensor:
        return self.original_module(x) if weights is None else functional_call(self.original_module, weights, (x,))

    if n == 1 or not any(own):
        return run_with(own[0], x)
    if route.tokens and not (self.stack_is_head and route.kept):
        return torch.cat([run_with(*pair) for pair in zip(own, route.split(x, dim=1), strict=True)], dim=1)
    if rows == 1 < route.batch:  # positions that are the same for all rows
        each = [run_with(weights, x) for weights in own]
        return torch.cat([y.expand(route.batch // n, *y.shape[1:]) for y in each])
    if self.stack_is_head and route.kept:
        blocks = list(route.kept)
    elif route.batch % n or rows % route.batch:
        raise RuntimeError(f"{self.stack_path}: {rows} rows are not the {route.batch} of the batch, in {n} blocks")
    else:
        blocks = [rows // n] * n
    return torch.cat([run_with(*pair) for pair in zip(own, x.split(blocks), strict=True)])


def _full_weights_of(wrapper: ModulesToSaveWrapper, name: str | None) -> dict[str, Tensor] | None:
    """Return the weights that an adapter has in full, in the base's dtype; None if it has none of this module."""
    route: Route = wrapper.stack_route
    if name in route.loaded:
        return route.weights[name].get(wrapper.stack_path)
    if name not in wrapper.modules_to_save:
        return None
    base = wrapper.original_module
    return {key: p.to(getattr(base, key).dtype) for key, p in wrapper.modules_to_save[name].named_parameters()}


def stacked_forward(self: LoraLayer, x_MTK: Tensor, *args: object, **kwargs: object) -> Tensor:
    """Compute the output of an adapted layer: each block of rows through the base weight and its own adapter."""
    route: Route = self.stack_route
    n, shape = len(route.names), x_MTK.shape
    if n == 0 or (sum(route.tokens) != shape[:-1].numel() if route.tokens else shape[0] % n):
        raise RuntimeError(f"{shape[0]} rows cannot be split into blocks for {n} routed adapters")
    x = x_MTK.reshape(-1, shape[-1])
    # Two dimensions, so that y is no view: autograd then lets the adapters add to it in place.
    y = self.base_layer(x, *args, **kwargs)
    joined = _join_blocks(self, y)
    gain = joined.gain
    if not sum(joined.ranks):
        return y.view(*shape[:-1], -1)
    x = x.to(y.dtype)
    if route.dropout_keys is not None:
        x = _dropout(self, x.view(shape), route).view(x.shape)
    y = _add_adapters(y, x, joined, route)
    if gain is not None:
        # As in PEFT, the product with W that DoRA scales is of the input after dropout.
        dropped = route.dropout_keys is not None and any(_dropout_rate(self, name) for name in route.names)
        adapted = _add_adapters(self.base_layer(x, *args, **kwargs), x, joined, route) if dropped else y
        if (bias := self.get_base_layer().bias) is not None:
            adapted = adapted - bias
        if route.tokens:
            blocks = zip(route.split(y), route.split(adapted), gain, strict=True)
            y = torch.cat([torch.addcmul(*block) for block in blocks])
        else:
            y = torch.addcmul(y.view(n, -1, y.shape[-1]), adapted.view(n, -1, y.shape[-1]), gain)
    return y.view(*shape[:-1], -1)


def _add_adapters(y: Tensor, x: Tensor, joined: JoinedBlocks, route: Route) -> Tensor:
    """Add to the outputs of the base layer those of each block's adapter; y (M T, D), x (M T, K).

    In place, unless the route keeps the products of the base layers as they are.

    Short blocks go through the columns of all adapters in one product, and those of others are zeroed. Long ones on a
    CPU take a product each: there the columns of others cost more than the calls (``benchmarks/cpu_kernels.py``).
    """
    a_RK, b_DR, ranks, scales, _ = joined
    sizes = route.tokens or (len(x) // len(route.names),) * len(route.names)
    if len(sizes) > 1 and max(sizes) >= LONG_BLOCK and x.device.type == "cpu" and not torch.compiler.is_compiling():
        own = y.clone() if route.keeps_products else y
        added: Tensor = BlockwiseUpdate.apply(own, x, a_RK, b_DR, ranks, scales, sizes)
        return added
    h = torch.mm(x, a_RK.t())
    h = (h.view(_blocks_shape(route, h)) * _block_mask(route, ranks, scales, y)).view(h.shape)
    return y.addmm(h, b_DR.t()) if route.keeps_products else y.addmm_(h, b_DR.t())


def _join_blocks(layer: LoraLayer, like: Tensor) -> JoinedBlocks:
    """Put the routed adapters side by side, in the dtype of ``like``; the result is kept while the stack is frozen."""
    route: Route = layer.stack_route
    if route.joined is not None and layer.stack_path in route.joined:
        return route.joined[layer.stack_path]
    _kept_on(like.device, layer, "stack_start")
    parts = [_block_of(layer, name) for name in route.names]
    found = [part for part in parts if part is not None] or [Block(like[:0, :0], like[:0, :0], 0.0)]
    a_RK = torch.cat([part.A for part in found]).to(like.dtype)
    joined = JoinedBlocks(
        a_RK,
        torch.cat([part.B for part in found], dim=1).to(like.dtype),
        tuple(0 if part is None else part.A.shape[0] for part in parts),
        tuple(0.0 if part is None else part.scale for part in parts),
        _dora_gain(layer, parts, a_RK),
    )
    if route.joined is not None:
        route.joined[layer.stack_path] = joined
    return joined


def _block_of(layer: LoraLayer, name: str | None) -> Block | None:
    """Return what a block of rows that goes through this adapter uses in this layer."""
    start: StartFactors | None = layer.stack_start
    route: Route = layer.stack_route
    if name is not None and name not in route.loaded and name in layer.lora_A:
        scale = layer.scaling[name]
        own = Block(layer.lora_A[name].weight, layer.lora_B[name].weight, scale)
        if name in layer.lora_magnitude_vector:
            own = own._replace(magnitude=layer.lora_magnitude_vector[name].weight)
        return _append_block(own, start.A, -start.B) if start is not None and start.frozen_block_of == "own" else own
    other = route.loaded.get(name, {}).get(layer.stack_path) if name is not None else None
    if start is None or start.frozen_block_of != "others":
        return other
    scale = next(iter(layer.scaling.values()))
    return Block(start.A, start.B, scale) if other is None else _append_block(other, start.A, start.B * scale)


def _append_block(block: Block, a: Tensor, b: Tensor) -> Block:
    a, b = a.to(block.A), b.to(block.B)
    return block._replace(A=torch.cat([block.A, a]), B=torch.cat([block.B, b], dim=1))


@torch.no_grad()
def weight_norms(layer: LoraLayer) -> Tensor:
    """Return the norms of the base weight's rows, shape (D,), float32; computed once."""
    if layer.stack_norms is None:
        w_DK = dequantized_weight(layer.get_base_layer()).float()
        vars(layer)["stack_norms"] = w_DK.norm(dim=0 if layer.fan_in_fan_out else 1)
    return layer.stack_norms


def _kept_on(device: torch.device, layer: LoraLayer, name: str) -> Any:
    """Return what the stack keeps for a layer, moved to a device once: DDP would send a buffer with every forward."""
    kept = getattr(layer, name)
    if isinstance(kept, StartFactors) and kept.A.device != device:
        vars(layer)[name] = kept._replace(A=kept.A.to(device), B=kept.B.to(device))
    elif isinstance(kept, Tensor) and kept.device != device:
        vars(layer)[name] = kept.to(device)
    return getattr(layer, name)


def _dora_gain(layer: LoraLayer, parts: Sequence[Block | None], a_RK: Tensor) -> Tensor | None:
    """Return DoRA's factor ``m / ||W + s B A|| - 1`` of each block, shape (N, 1, D); None if no block has
    magnitudes.
    """
    if not any(part is not None and part.magnitude is not None for part in parts):
        return None
    norms_D = _kept_on(a_RK.device, layer, "stack_norms")
    with torch.no_grad():
        wa_RD = layer.base_layer(a_RK.detach())
        bias = layer.get_base_layer().bias
        wa_RD = (wa_RD if bias is None else wa_RD - bias).float()
    gains, row = [], 0
    for part in parts:
        r = 0 if part is None else part.A.shape[0]
        if part is None or part.magnitude is None:
            gains.append(torch.zeros_like(norms_D))
        else:
            with torch.no_grad():
                a, b, s = part.A.float(), part.B.float(), part.scale
                cross, square = (b * wa_RD[row : row + r].t()).sum(1), ((b @ (a @ a.t())) * b).sum(1)
                norm = (norms_D.square() + 2 * s * cross + s * s * square).clamp(min=0).sqrt()
                norm[norm == 0] = 1  # such a row gives zero, whatever multiplies it
            gains.append(part.magnitude / norm - 1)
        row += r
    return torch.stack(gains).unsqueeze(1).to(a_RK.dtype)


def _block_mask(route: Route, ranks: tuple[int, ...], scales: tuple[float, ...], like: Tensor) -> Tensor:
    """Return each block's scaling on its own columns and zero elsewhere, shape (N, 1, R), or (T, R) where the blocks
    are the tokens of one row; built once per kind of layer.
    """
    if torch.compiler.is_compiling():  # the graph of one layer is that of others only if it leaves nothing behind
        return _build_block_mask(ranks, scales, like)
    key = (ranks, scales, like.device, like.dtype)
    if key not in route.blocks:
        # Training uses it too, which takes no tensor made in inference mode.
        with torch.inference_mode(False):
            mask = _build_block_mask(ranks, scales, like)
            if route.tokens:
                tokens = torch.tensor(route.tokens).to(like.device)
                mask = mask[:, 0].repeat_interleave(tokens, dim=0, output_size=sum(route.tokens))
            route.blocks[key] = mask
    return route.blocks[key]


def _blocks_shape(route: Route, h: Tensor) -> tuple[int, ...]:
    return tuple(h.shape) if route.tokens else (len(route.names), -1, h.shape[-1])


def _build_block_mask(ranks: tuple[int, ...], scales: tuple[float, ...], like: Tensor) -> Tensor:
    rows = [like.new_full((1, r), s) for r, s in zip(ranks, scales, strict=True)]
    return torch.block_diag(*rows).unsqueeze(1)


def _dropout(layer: LoraLayer, x_MTK: Tensor, route: Route) -> Tensor:
    """Apply inverted dropout per block, each from its own stream and over its own rows and length."""
    assert route.dropout_keys is not None
    keep = torch.ones_like(x_MTK)
    # Tokens of one row are blocks as they are; rows are drawn for without what they are filled up with.
    blocks = route.split(keep[0] if route.tokens else keep)
    for i, (name, key) in enumerate(zip(route.names, route.dropout_keys, strict=True)):
        if p := _dropout_rate(layer, name):
            generator = torch.Generator(x_MTK.device).manual_seed(stream_seed(*key, layer.stack_index))
            block = blocks[i]
            if not route.tokens:
                block = block[: route.rows[i] if route.rows else None, : route.lengths[i] if route.lengths else None]
            draw = torch.empty(block.shape, device=x_MTK.device).bernoulli_(1 - p, generator=generator)
            block.copy_(draw.div_(1 - p))
    return x_MTK * keep


def _dropout_rate(layer: LoraLayer, name: str | None) -> float:
    return getattr(layer.lora_dropout[name], "p", 0.0) if name in layer.lora_dropout else 0.0
