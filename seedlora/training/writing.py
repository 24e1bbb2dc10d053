"""Write a replica to its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from seedlora.adapters.writing import write_adapter
from seedlora.training.whole_models import WholeModels

if TYPE_CHECKING:
    from seedlora.adapters.stack import AdapterStack
    from seedlora.training.model_options import ModelOptions


def write_replica(
    path: Path,
    name: str,
    stack: AdapterStack,
    options: ModelOptions,
    *,
    files: Mapping[str, str | bytes] | None = None,
    writer: bool = True,
) -> None:
    """Write the folder of one replica: PEFT's of an adapter, or a whole model. All ranks must call it.

    Args:
        path: of the folder.
        name: of the replica.
        stack: that holds it.
        options: of the replica.
        files: further files, by name.
        writer: whether this rank writes.
    """
    # Every rank takes part where each holds a part.
    layers, magnitudes, modules = stack.stored_factors(name), stack.magnitudes(name), stack.full_weights(name)
    if not writer:
        return
    if options.is_full_finetuning:
        WholeModels(stack, options).write(path, modules, files or {})
        return
    config = options.saved_config()
    write_adapter(path, layers, config, files=files, magnitudes=magnitudes, modules=modules)
