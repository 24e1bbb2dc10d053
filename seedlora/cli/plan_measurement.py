"""Measure what ``train.py --plan`` tells: a few steps for their time and memory, within a limit, without a trace."""

from __future__ import annotations

from datetime import timedelta

from rich.console import Console

from seedlora.callbacks.measured_steps import MeasuredSteps
from seedlora.cli.parser import SeedLoRACLI
from seedlora.run.cost import PeakMemory
from seedlora.run.memory import gib
from seedlora.run.plan import RunPlan

#: Steps that are measured; the one before them warms up.
STEPS = 3


def measure_plan(cli: SeedLoRACLI, plan: RunPlan, console: Console, *, until: float) -> None:
    """Train a few steps and print what they took.

    Args:
        cli: of the run.
        plan: of it.
        console: to print to.
        until: as for :class:`MeasuredSteps`.
    """
    ensemble = cli.ensemble
    if not ensemble.next_names:
        console.print("All is trained already, so there was nothing to measure.")
        return
    accumulate = cli.trainer.accumulate_grad_batches
    trainer = cli.instantiate_trainer(fast_dev_run=(STEPS + 1) * accumulate)
    trainer.limit_val_batches = 0
    steps = MeasuredSteps(PeakMemory(trainer.strategy.root_device), until)
    trainer.callbacks.append(steps)
    trainer.fit(cli.model, datamodule=cli.datamodule)
    stack = min(len(plan.replicas), ensemble.stack_size or len(plan.replicas))
    sentence = _sentence(plan, steps, stack, accumulate, has_controls=ensemble.trains_controls)
    console.print(sentence, highlight=False)


def _sentence(plan: RunPlan, steps: MeasuredSteps, stack: int, accumulate: int, *, has_controls: bool) -> str:
    """Say what was measured, and on how much if that was little."""
    seconds, done = steps.seconds * accumulate, steps.micro_batches
    total = timedelta(seconds=round(seconds * plan.steps * plan.passes * plan.share))
    what = "training the seeds" if has_controls else "training"
    few = f"; measured on {done} of {accumulate} micro-batches" if done < accumulate else ""
    measured, estimated = gib(steps.peak_bytes), gib(plan.memory.total)
    return (
        f"Measured: {seconds:.3g} s a step of {stack} {plan.one}s, so about {total} (h:mm:ss) of {what}; memory "
        f"{measured}, where the estimate is {estimated} for the largest forward to come{few}. Nothing was written."
    )
