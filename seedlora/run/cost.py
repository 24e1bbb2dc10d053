"""Keep ``cost.json``: what a run is going to do, and what it took."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Protocol, cast

import torch

from seedlora.model.loading import model_identity
from seedlora.records.cost import COST, CostRecord, PlanRecord
from seedlora.run.plan import RunPlan
from seedlora.utils.options import name_option

#: Whose versions a run writes down.
LIBRARIES = ("seedlora", "torch", "lightning", "transformers", "tokenizers", "peft", "numpy")


class PhaseClock(Protocol):
    """Measure the phases of a fit, as :class:`seedlora.callbacks.throughput.Throughput` does."""

    @property
    def took(self) -> Mapping[str, float]:
        """Return the seconds of the last fit by phase."""

    def enter(self, phase: str | None) -> None:
        """Begin another phase; ``None`` stops the clock."""


def write_cost(run: Path, plan: RunPlan, libraries: Sequence[str] = ()) -> None:
    """Write down what a run is going to do and by which libraries; what an earlier part took is kept.

    Args:
        run: its folder.
        plan: of the run.
        libraries: further ones, which decide the data.

    Raises:
        ValueError: if an older ``cost.json`` cannot be read.
    """
    versions = {name: version(name) for name in (*LIBRARIES, *libraries)}
    try:
        before = COST.read(run)
    except ValueError as error:
        resume = name_option("ensemble.resume", True)
        raise ValueError(f"{error}; without it {resume} does not know what the run has cost so far") from None
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    cost: CostRecord = {
        "started": now if before is None else before.get("started", now),
        "plan": cast("PlanRecord", asdict(plan)),
        "versions": {"python": python_version(), **versions},
        "base": model_identity(plan.model),
        "took": {} if before is None else before["took"],
        "peak_bytes": 0 if before is None else before["peak_bytes"],
    }
    COST.write(run, cost)


def earlier_seconds(run: Path) -> float:
    """Return the seconds that earlier parts of a run have trained, validated and fused; 0 for a new one."""
    cost = COST.read(run)
    return 0.0 if cost is None else sum(sum(phases.values()) for phases in cost["took"].values())


@contextlib.contextmanager
def timed(run: Path, device: torch.device, clock: PhaseClock, control: str | None = None) -> Iterator[None]:
    """Add the seconds that a fit takes, phase by phase, to those in ``cost.json``, also when it is interrupted.

    Args:
        run: its folder, with what :func:`write_cost` wrote.
        device: whose memory is watched, while seeds are trained.
        clock: the callback that knows the seconds of each phase.
        control: the control that is trained; default: the seeds.
    """
    peak = PeakMemory(device)
    try:
        yield
    finally:
        clock.enter(None)
        if (cost := COST.read(run)) is not None:
            before = cost["took"].get(control or "seeds", {})
            added = {phase: before.get(phase, 0.0) + seconds for phase, seconds in clock.took.items()}
            cost["took"][control or "seeds"] = {**before, **added}
            if control is None:
                cost["peak_bytes"] = max(cost["peak_bytes"], peak.bytes)
            COST.write(run, cost)


class PeakMemory:
    """Measure the most memory that is held, beside what was held when this was made.

    Args:
        device: a CUDA device, whose allocations are counted, or the CPU: then this process's resident memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.init()  # or there are no statistics to reset, which is an error
        self.forget()
        cuda = device.type == "cuda"
        self._before = torch.cuda.memory_allocated(device) if cuda else _process_memory("VmRSS")

    def forget(self) -> None:
        """Start the peak anew from what is held now."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with contextlib.suppress(OSError):  # Linux forgets the old peak
                Path("/proc/self/clear_refs").write_text("5")

    @property
    def bytes(self) -> int:
        """Return the most bytes that were held since this was made."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self._before
        return _process_memory("VmHWM") - self._before


def _process_memory(field: str) -> int:
    """Read ``VmRSS``, now, or ``VmHWM``, the peak; the peak for both where there is no /proc."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(field))
