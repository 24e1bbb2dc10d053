"""Say what would keep a run from fitting, or slow it down, and which option helps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch

from seedlora.model.loading import fast_dtype
from seedlora.model.recomputation import RECOMPUTATIONS
from seedlora.run.ensemble import Ensemble
from seedlora.run.memory import PART_USED, device_memory, gib, memory_of
from seedlora.run.stack_data import PlannedData
from seedlora.utils.options import name_option

if TYPE_CHECKING:
    from seedlora.training.model_options import ModelOptions


def plan_advice(trainer: pl.Trainer, options: ModelOptions, data: PlannedData, ensemble: Ensemble) -> list[str]:
    """Return a sentence for each thing that an option would mend: too little memory, a slow dtype.

    Args:
        trainer: of the run.
        options: of the model.
        data: the data module, set up.
        ensemble: of the run, its stack size decided.
    """
    return [*_about_memory(trainer, options, data, ensemble), *_about_dtype(options)]


def _about_memory(trainer: pl.Trainer, options: ModelOptions, data: PlannedData, ensemble: Ensemble) -> Iterator[str]:
    """Name the first option by which the estimate fits, those first that cost least time."""
    n, available = len(ensemble.replicas), device_memory(trainer)
    stack = min(n, ensemble.stack_size or n)
    needed, limit = memory_of(trainer, options, data, ensemble.replicas)(stack).total, PART_USED * available
    if needed <= limit:
        return
    more = RECOMPUTATIONS[RECOMPUTATIONS.index(options.gradient_checkpointing) + 1 :]
    candidates = [
        (name_option("model.gradient_checkpointing", which), replace(options, gradient_checkpointing=which), stack)
        for which in more
    ]
    least = candidates[-1][1] if candidates else options
    words = f"{candidates[-1][0]} and " if candidates else ""
    sizes = range(stack - 1, 0, -1)
    candidates += [(f"{words}{name_option('ensemble.stack_size', size)}", least, size) for size in sizes]
    about = f"the estimate, {gib(needed)}, is more than {PART_USED:.0%} of the {gib(available)} that the device has"
    for option, changed, size in candidates:
        found = memory_of(trainer, changed, data, ensemble.replicas)(size).total
        if found <= limit:
            yield f"{about}; {option} would take {gib(found)}"
            return
    smaller = f"{name_option('data.batch_size')}, or {name_option('model.quantization', 'nf4')}"
    yield f"{about}, and no recomputation or smaller stack is enough; give a smaller {smaller}"


def _about_dtype(options: ModelOptions) -> Iterator[str]:
    """Say so if the machine multiplies another dtype faster."""
    fast = fast_dtype()
    if options.base_dtype != fast:
        asked, better = (str(dtype).removeprefix("torch.") for dtype in (options.base_dtype, fast))
        why = "has no units for it" if options.base_dtype == torch.bfloat16 else "is several times faster with less"
        yield f"{name_option('model.dtype', asked)} is slow: this machine {why}; {name_option('model.dtype', better)}"
