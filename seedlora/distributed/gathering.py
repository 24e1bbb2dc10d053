"""Put together what the processes of a run have found, each in its own part of the rows."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed

_Found = TypeVar("_Found")


def gathered(found: list[_Found]) -> list[_Found]:
    """Return the lists of all ranks one after the other, as plain data. All ranks must call it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return found
    parts: list[list[_Found]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(parts, found)
    return [each for part in parts for each in part]
