"""How long each replica trains."""

from __future__ import annotations

from dataclasses import dataclass

BUDGETS = ("equal", "full")


@dataclass(frozen=True)
class ReplicaBudget:
    """How long each replica trains: whole epochs, or optimizer steps, whichever ends first; ``None`` is no limit."""

    epochs: int | None
    steps: int | None

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of a replica, given those of an epoch."""
        limits = [] if self.steps is None else [self.steps]
        if self.epochs is not None:
            limits.append(self.epochs * steps_per_epoch)
        return min(limits)


def replica_budget(budget: str, *, n: int, max_epochs: int | None, max_steps: int) -> ReplicaBudget:
    """Divide the trainer's ``max_epochs`` and ``max_steps`` among ``n`` replicas, or give each all of it.

    Args:
        budget: ``equal`` divides by ``n``, so that the ensemble costs what one seed would; ``full`` does not.
        n: number of seeds of the ensemble.
        max_epochs: of the trainer; ``None`` or -1 is no limit.
        max_steps: of the trainer; -1 is no limit.

    Raises:
        ValueError: for an unknown budget, no limit at all, or a limit that ``n`` does not divide.
    """
    if budget not in BUDGETS:
        raise ValueError(f"Unknown ensemble.budget '{budget}'; choose one of {', '.join(BUDGETS)}")
    limits = {
        "max_epochs": None if max_epochs in (None, -1) else max_epochs,
        "max_steps": None if max_steps == -1 else max_steps,
    }
    if all(limit is None for limit in limits.values()):
        raise ValueError("the run has no end: set trainer.max_epochs or trainer.max_steps")
    if budget == "equal":
        for name, limit in limits.items():
            if limit is not None and (limit % n or limit == 0):
                raise ValueError(
                    f"ensemble.budget equal shares trainer.{name} {limit} among {n} seeds, which does not divide "
                    f"evenly; set --trainer.{name} to a multiple of {n}, or --ensemble.budget full to give each seed "
                    f"all {limit}"
                )
        limits = {name: None if limit is None else limit // n for name, limit in limits.items()}
    return ReplicaBudget(limits["max_epochs"], limits["max_steps"])
