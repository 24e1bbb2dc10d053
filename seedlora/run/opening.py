"""Say in the terminal, before a run, what it is going to do."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from seedlora.datamodules import InstructionDataModule
from seedlora.datamodules.preview import packing_advice
from seedlora.datamodules.prompts import asked_of_a_server
from seedlora.run.plan import RunPlan
from seedlora.run.stack_data import HasPrompt


def opening(plan: RunPlan | None, data: object, advice: Sequence[str] = ()) -> list[Table | str]:
    """Return the plan, the prompt that a server must use, and what an option would mend.

    Args:
        plan: of the run; None where the data does not say what it takes.
        data: the data module, set up.
        advice: of :func:`seedlora.run.plan_advice.plan_advice`.
    """
    told: list[Table | str] = [] if plan is None else [plan.table()]
    if isinstance(data, HasPrompt):
        told.append(f"prompt: {asked_of_a_server(data.prompt_record())}")
    told += advice
    if plan is not None and isinstance(data, InstructionDataModule):
        told += filter(None, [packing_advice(data, plan.padding)])
    return told
