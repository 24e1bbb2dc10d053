"""Run several LoRA adapters of one PEFT model at once, each on its own block of rows: the stacked forward.

Shape legend: ``N`` adapters routed, ``M`` rows of the batch (``N`` equal blocks), ``T`` tokens, ``K`` input and ``D``
output features, ``R`` the ranks of the routed adapters together.

Of a PEFT layer only ``forward`` is replaced. The frozen base layer sees all rows in one product; the adapters are two
more products with ``R`` columns::

    h = (x [A_1; ...; A_N]^T) * blocks        # blocks zeroes what belongs to another adapter, and scales
    y = base(x) + h [B_1 ... B_N]^T

DoRA (Liu et al., arXiv 2402.09353) multiplies each output by ``m / ||W + s B A||``: the norms of the rows, without a
gradient, as in its section 4.3 and in PEFT. They need no matrix of the shape of W::

    ||W + s B A||^2 = ||W||^2 + 2 s diag(B (W A^T)^T) + s^2 diag(B (A A^T) B^T)

``W A^T`` is the base layer on the rows of A, whatever it is quantised to, and ``||W||`` is computed once.

PiSSA (Meng et al., arXiv 2404.02948) starts each adapter at the same factors ``A_0, B_0`` of W and trains it over
``W - s B_0 A_0``. The base layer keeps W, and every replica has the frozen block ``-s B_0 A_0`` beside its own: so the
base model is the original one bit for bit, and nothing has to be put back. Only where W is quantised does the base
layer hold the residual, whose smaller entries are what PiSSA is for there; then the others, the base model among them,
have ``+s B_0 A_0`` beside theirs.

Modules that are trained in full (PEFT's ``modules_to_save``) are whole in every replica: each block of rows goes
through the module with its replica's own weights, one block after the other.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from types import MethodType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from seedlora.adapters.stacked_forward import (
    Block,
    Route,
    StartFactors,
    full_module_forward,
    stacked_forward,
    weight_norms,
)
from seedlora.distributed.sharded import gather_parameter
from seedlora.updates.factors import LoRAFactors

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper
    from transformers import PreTrainedModel

#: What a PEFT layer holds of one adapter; the last is a module that is trained in full.
ADAPTER_PARTS = ("lora_A", "lora_B", "lora_magnitude_vector", "modules_to_save")


class AdapterStack:
    """Routes blocks of rows through the adapters of ``model``.

    The first ``M / N`` rows of every forward go through the first name routed, the next through the second, and so on;
    or, of one row, the first so many tokens.
    An adapter is a PEFT adapter of the model (trainable or not), one put here by :meth:`load`, or ``None`` for the
    base model alone.

    The route stays until it is changed, also through a backward that recomputes the forward (gradient checkpointing).

    Full weights are float32 from then on. Where the base model's modules share one matrix (a tied head), those of an
    adapter share one, too.

    Args:
        model: a PEFT model whose LoRA layers are linear, without bias; plain LoRA, rsLoRA or DoRA. DoRA's magnitudes
            are set to the norms of the base weights, as PEFT sets them, in float32. Modules that are trained in full
            have no modules inside.
        starts: factors at which the model's adapters start, by layer path, where the base weights give them.
        keeps_products: the results of the base layers are kept for the backward pass, so that nothing is added to them
            in place.

    Raises:
        ValueError: if a layer of another kind carries an adapter.
    """

    def __init__(
        self, model: PeftModel, *, starts: Mapping[str, StartFactors] | None = None, keeps_products: bool = False
    ) -> None:
        from peft.tuners.lora import LoraLayer
        from peft.utils import ModulesToSaveWrapper

        self.model = model
        self._route = Route(keeps_products=keeps_products)
        self.layers: dict[str, LoraLayer] = {}
        #: What is trained in full, by path.
        self.modules: dict[str, ModulesToSaveWrapper] = {}
        prefix = len("base_model.model.")
        for name, layer in model.named_modules():
            path = name[prefix:]
            if isinstance(layer, ModulesToSaveWrapper):
                self.modules[path] = layer
            if not isinstance(layer, LoraLayer):
                continue
            if layer.lora_embedding_A or any(layer.lora_bias.values()):
                raise ValueError(
                    f"layer {path} carries an adapter that cannot be stacked: LoRA and DoRA on linear layers are, "
                    "embeddings and lora_bias are not"
                )
            self.layers[path] = layer
            vars(layer).update(stack_path=path, stack_index=len(self.layers), stack_route=self._route)
            vars(layer).update(stack_start=(starts or {}).get(path), stack_norms=None)
            vars(layer)["forward"] = MethodType(stacked_forward, layer)
            with torch.no_grad():
                for adapter, start in product(layer.lora_A, filter(None, [layer.stack_start])):
                    layer.lora_A[adapter].weight.copy_(start.A)
                    layer.lora_B[adapter].weight.copy_(start.B)
                for magnitude in layer.lora_magnitude_vector.values():
                    magnitude.weight.data = weight_norms(layer).clone()
        if self.modules:
            self._copy_full_modules()

    def _copy_full_modules(self) -> None:
        """Give every adapter float32 weights of its own for modules trained in full, and those modules
        their forward.
        """
        base = self.model.get_base_model()
        head = base.get_output_embeddings()
        own: dict[tuple[str, int], nn.Parameter] = {}
        for path, wrapper in self.modules.items():
            for name, module in wrapper.modules_to_save.items():
                for key, shared in wrapper.original_module.named_parameters():
                    one = (name, id(shared))
                    if one not in own:
                        own[one] = nn.Parameter(getattr(module, key).data.float())
                    setattr(module, key, own[one])
            vars(wrapper).update(stack_path=path, stack_route=self._route, stack_is_head=wrapper is head)
            vars(wrapper)["forward"] = MethodType(full_module_forward, wrapper)

        forward = base.forward

        @functools.wraps(forward)
        def counting(*args: object, **kwargs: object) -> object:
            given = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
            self._route.batch = len(next(inputs for inputs in given if isinstance(inputs, Tensor)))
            return forward(*args, **kwargs)

        vars(base)["forward"] = counting  # no hook: DeepSpeed takes those away after a fit

    def remove(self) -> PreTrainedModel:
        """Take the adapters off the model again, and return the base model as it was."""
        if self.modules:
            del vars(self.model.get_base_model())["forward"]
        for wrapper in self.modules.values():
            wrapper.set_adapter([])  # or PEFT would leave the active adapter's copy in the module's place
        return self.model.unload()

    def route(
        self,
        names: Sequence[str | None],
        *,
        lengths: Sequence[int] = (),
        rows: Sequence[int] = (),
        tokens: Sequence[int] = (),
        dropout_keys: Sequence[tuple[int, ...]] | None = None,
    ) -> None:
        """Choose the adapters of the next forwards, one per block of rows.

        Args:
            names: one adapter per block, ``None`` for the base model.
            lengths: tokens of each block before it was padded to the length of the stack; only dropout needs them.
            rows: rows of each block before it was filled up to the size of the others; only dropout needs them.
            tokens: of each block, where the forward has one row that holds them all, one after the other.
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
        if self._route.tokens != tuple(tokens):
            self._route.tokens, self._route.blocks = tuple(tokens), {}
        self._route.joined = None if self._route.joined is None else {}
        self._route.dropout_keys = None if dropout_keys is None else tuple(dropout_keys)

    @contextmanager
    def head_sees(self, keep_MT: Tensor) -> Iterator[None]:
        """Give the head, inside the block, the positions kept alone, one after the other, in the order of the rows."""
        if self.modules:
            blocks = self._route.split(keep_MT.flatten()[None], dim=1)
            self._route.kept = tuple(torch.stack([block.sum() for block in blocks]).tolist())
        try:
            yield
        finally:
            self._route.kept = ()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Promise that no adapter changes inside the block: a layer joins and casts its adapters once per route.

        For generation, whose forwards are so small that this would cost as much as they do.
        """
        self._route.joined = {}
        try:
            yield
        finally:
            self._route.joined = None

    def load(
        self,
        name: str,
        layers: Mapping[str, LoRAFactors],
        *,
        magnitudes: Mapping[str, Tensor] | None = None,
        modules: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Put an adapter beside the model's own, for evaluation: a fused one, for example.

        It replaces a loaded adapter of the same name, takes no part in training and is in no ``state_dict``.

        Args:
            name: how :meth:`route` will call it.
            layers: one adapter (``N = 1``) per layer path; layers left out keep the base weights.
            magnitudes: of shape (D,) for the layers that are DoRA's.
            modules: full weights by key within the model (``lm_head.weight``), of modules that this stack trains in
                full; kept in the dtype of the base's. Modules left out keep the base weights.
        """
        self._route.loaded[name], self._route.weights[name] = {}, {}
        for key, weight in (modules or {}).items():
            path, _, parameter = key.rpartition(".")
            like = getattr(self.modules[path].original_module, parameter)
            self._route.weights[name].setdefault(path, {})[parameter] = weight.to(like)
        for path, factors in layers.items():
            if path not in self.layers and not factors.B.any():
                continue  # the zeros of a fused adapter, which servers want for layers that nobody trained
            layer, magnitude = self.layers[path], (magnitudes or {}).get(path)
            a, b = (factor[0].to(layer.get_base_layer().weight.device) for factor in (factors.A, factors.B))
            if magnitude is not None:
                magnitude = magnitude.to(weight_norms(layer)).to(a.device)
            self._route.loaded[name][path] = Block(a, b, 1.0, magnitude)

    def unload(self, name: str) -> None:
        """Forget an adapter that :meth:`load` put here."""
        del self._route.loaded[name], self._route.weights[name]

    def loaded_sha256(self, name: str) -> str:
        """Return the sha256 of the weights of an adapter that :meth:`load` put here."""
        digest = hashlib.sha256()
        for path, block in sorted(self._route.loaded[name].items()):
            digest.update(path.encode())
            for tensor in (block.A, block.B, *(() if block.magnitude is None else (block.magnitude,))):
                digest.update(_bytes_of(tensor))
        for path, weights in sorted(self._route.weights[name].items()):
            for key, tensor in sorted(weights.items()):
                digest.update(f"{path}.{key}".encode() + _bytes_of(tensor))
        return digest.hexdigest()

    def factors(self, names: Sequence[str]) -> dict[str, LoRAFactors]:
        """Return the current updates of PEFT adapters, per layer a stack in float32, detached. All ranks must call it.

        They are relative to the original base weights, also those of PiSSA; of DoRA they are the part ``s B A`` alone.
        """
        stacks = {name: self.stored_factors(name) for name in names}
        return {
            path: LoRAFactors.stack(
                [
                    LoRAFactors(of[path].A.float(), of[path].B.float() * layer.scaling[name])
                    for name, of in stacks.items()
                ]
            )
            for path, layer in self.layers.items()
        }

    def stored_factors(self, name: str) -> dict[str, LoRAFactors]:
        """Return one PEFT adapter as its file holds it: ``B`` without the scaling; detached. All ranks must call it.

        PiSSA's is ``[A; A_0]`` and ``[B, -B_0]``, of twice the rank, and belongs to the original base.
        """
        stored = {}
        for path, layer in self.layers.items():
            a, b = gather_parameter(layer.lora_A[name].weight), gather_parameter(layer.lora_B[name].weight)
            if (start := layer.stack_start) is not None and start.frozen_block_of != "none":
                a, b = torch.cat([a, start.A.to(a)]), torch.cat([b, -start.B.to(b)], dim=1)
            stored[path] = LoRAFactors(a[None], b[None])
        return stored

    def magnitudes(self, name: str) -> dict[str, Tensor]:
        """Return DoRA's magnitudes of one PEFT adapter, shape (D,) per layer, detached; none for others. On
        all ranks.
        """
        return {
            path: gather_parameter(layer.lora_magnitude_vector[name].weight)
            for path, layer in self.layers.items()
            if name in layer.lora_magnitude_vector
        }

    def full_weights(self, name: str) -> dict[str, Tensor]:
        """Return the weights that one PEFT adapter has in full, by key within the model: float32, detached,
        no copies.
        """
        return {
            f"{path}.{key}": parameter.detach()
            for path, wrapper in self.modules.items()
            for key, parameter in wrapper.modules_to_save[name].named_parameters()
        }

    def is_finite(self, name: str) -> bool:
        """Return whether no weight of a PEFT adapter is NaN or infinite. All ranks must call it."""
        # One answer for all: each is a wait for the device.
        return bool(
            torch.stack([gather_parameter(parameter).isfinite().all() for parameter in self.parameters(name)]).all()
        )

    def parameters(self, name: str, parts: Sequence[str] = ADAPTER_PARTS) -> list[nn.Parameter]:
        """Return the parameters of one PEFT adapter, layer by layer, in the order of the parts of
        :data:`ADAPTER_PARTS`.
        """
        *factors, full = ADAPTER_PARTS
        layers = self.layers.values()
        found = [
            getattr(layer, part)[name].weight
            for layer in layers
            for part in parts
            if part in factors and name in getattr(layer, part)
        ]
        if full in parts:
            copies = (wrapper.modules_to_save[name] for wrapper in self.modules.values())
            found += dict.fromkeys(parameter for copy in copies for parameter in copy.parameters())  # a shared one once
        return found


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()
