"""Name the parts whose cases are tried one by one, each of a seed."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.reliability.counts import Outcome


def prepare(part: str, folder: Path) -> Callable[[int], Outcome]:
    """Make what all cases of a part need, and return what tries the case of a seed."""
    module: Any = import_module(f"benchmarks.reliability.{part}")
    world = module.make_world(folder / "world")
    return lambda seed: module.tried(seed, world, folder / "case")
