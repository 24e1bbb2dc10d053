"""The decoder layers of the base model through ``torch.compile``, in training alone."""

from __future__ import annotations

from collections.abc import Iterable
from types import MethodType
from typing import Any

import torch
from torch import nn


def check_backend(name: str) -> None:
    """See that ``torch.compile`` knows a backend.

    Raises:
        ValueError: if it does not, with those it knows.
    """
    if name not in (known := torch.compiler.list_backends(exclude_tags=())):
        shown = [backend for backend in known if not backend.endswith("_TESTING_ONLY")]
        raise ValueError(f"Unknown model.compile '{name}'; choose one of {', '.join(shown)}")


def compile_layers(layers: Iterable[nn.Module], backend: str) -> None:
    """Replace ``forward`` of each layer by a compiled one while the layer is in training mode.

    Layers of one class share what is compiled: one graph for the first, whose input takes no gradient, and one for all
    others, of any length. Another set of replicas in the stack is another pair. In eval mode, where routes and caches
    change with every forward, a layer stays as it is. Nothing is compiled before the first forward.

    Args:
        layers: called again for the same ones, it replaces what it did.
        backend: of :func:`torch.compile`.
    """
    # Graphs of an earlier fit are of adapters that are gone.
    torch.compiler.reset()
    compiled: dict[type[nn.Module], Any] = {}

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        kind = type(self)
        return (compiled[kind] if self.training else kind.forward)(self, *args, **kwargs)

    for layer in layers:
        # Dynamic from the start: a graph of the first length alone would be another one after a resume.
        compiled[type(layer)] = torch.compile(type(layer).forward, backend=backend, dynamic=True)
        vars(layer)["forward"] = MethodType(forward, layer)
