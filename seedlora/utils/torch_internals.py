"""All that is used of torch beyond what its documentation promises, one function for each use.

``tests/utils/test_torch_internals.py`` fails by the function's name when a release of torch takes one of these away.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def write_count(tensor: Tensor) -> int:
    """Return how often a tensor was written to in place.

    ``Tensor._version`` is autograd's own counter. It tells whether a result that was kept for a tensor still holds,
    without a comparison of all its values. A tensor made in inference mode has none, and raises ``RuntimeError``.
    """
    return tensor._version


def tensors_within(*values: object) -> list[Tensor]:
    """Return the tensors in nested tuples, lists and dicts, in order.

    ``torch.utils._pytree`` walks the arguments of a forward as ``torch.compile`` does.
    """
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def mark_rows_static(tensor: Tensor) -> None:
    """Tell ``torch.compile`` that a tensor's first dimension is a number and not a symbol.

    ``torch._dynamo.mark_static`` is the only way to say so of one dimension.
    """
    torch._dynamo.mark_static(tensor, 0)


def raise_recompile_limit(limit: int) -> None:
    """Let ``torch.compile`` keep at least so many graphs of one function; beyond its limit it compiles no more.

    ``torch._dynamo.config`` is the only place where that limit can be set.
    """
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, limit)


def cpu_multiplies_bfloat16() -> bool:
    """Return whether the processor has units for products in bfloat16: AMX tiles or AVX-512 BF16.

    ``torch.cpu`` knows, by functions that begin with an underscore.
    """
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
