"""Run the decoder layers of the base model through ``torch.compile`` in training."""

from __future__ import annotations

from collections.abc import Iterable
from types import MethodType
from typing import Any

import torch
from torch import nn

from seedlora.utils.options import name_option
from seedlora.utils.torch_internals import mark_rows_static, raise_recompile_limit, tensors_within

#: Graphs of one class of layers: 16 replicas that stop one by one.
_GRAPHS_OF_A_CLASS = 64


def check_backend(name: str) -> None:
    """Check that ``torch.compile`` knows a backend.

    Raises:
        ValueError: if it does not, with those it knows.
    """
    if name not in (known := torch.compiler.list_backends(exclude_tags=())):
        shown = [backend for backend in known if not backend.endswith("_TESTING_ONLY")]
        raise ValueError(f"Unknown {name_option('model.compile')} '{name}'; choose one of {', '.join(shown)}")


def compile_layers(layers: Iterable[nn.Module], backend: str) -> None:
    """Replace ``forward`` of each layer by a compiled one while the layer is in training mode.

    Layers of one class share what is compiled: a graph for the first, whose input takes no gradient, and one for all
    others; then, where lengths differ, two more for any length. Another set of replicas, or another number of rows, is
    two more. In eval mode, where routes and caches change with every forward, a layer stays as it is. Nothing is
    compiled before the first forward.

    Args:
        layers: called again for the same ones, it replaces what it did.
        backend: of :func:`torch.compile`.
    """
    # Graphs of an earlier fit are of adapters that are gone.
    torch.compiler.reset()
    # Beyond it, layers would run as they are. Torch's 8 are two sets of replicas.
    raise_recompile_limit(_GRAPHS_OF_A_CLASS)
    compiled: dict[type[nn.Module], Any] = {}

    def forward(self: nn.Module, *args: object, **kwargs: object) -> object:
        if not self.training:
            return type(self).forward(self, *args, **kwargs)
        for tensor in tensors_within(args, kwargs):
            # A number of rows seldom changes, and one that is a symbol makes tracing take ten times as long.
            mark_rows_static(tensor)
        return compiled[type(self)](self, *args, **kwargs)

    for layer in layers:
        compiled[type(layer)] = torch.compile(type(layer).forward, backend=backend)
        vars(layer)["forward"] = MethodType(forward, layer)
