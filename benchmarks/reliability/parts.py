"""Name the parts of the benchmark: what each needs once, and what tries the case of a seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.reliability.counts import Outcome


class Part(NamedTuple):
    """Name what makes the world of a part and what tries a case, and how many cases a release is judged by.

    Args:
        module: of this package.
        count: of cases.
        world: a function of the folder, and of ``options``.
        tried: a function of the seed, the world, and a folder.
        options: further arguments of ``world``.
    """

    module: str
    count: int
    world: str = "make_world"
    tried: str = "tried"
    options: tuple[str, ...] = ()


PARTS: Mapping[str, Part] = {
    "kills": Part("kills", 200),
    "ranks_ddp": Part("ranks", 50, options=("ddp",)),
    "ranks_zero2": Part("ranks", 50, options=("zero2",)),
    "ranks_fsdp2": Part("ranks", 50, options=("fsdp2",)),
    "full_disks": Part("disks", 20),
    "flipped_bits": Part("disks", 20, "make_killed", "tried_flip"),
    "adapters": Part("adapters", 2000),
    "rows": Part("rows", 2000),
    "run_folders": Part("run_folders", 500),
    "configs": Part("configs", 500),
}


def prepare(part: str, folder: Path) -> Callable[[int], Outcome]:
    """Make what all cases of a part need, and return what tries the case of a seed."""
    row = PARTS[part]
    module: Any = import_module(f"benchmarks.reliability.{row.module}")
    world = getattr(module, row.world)(folder / "world", *row.options)
    return lambda seed: getattr(module, row.tried)(seed, world, folder / "case")
