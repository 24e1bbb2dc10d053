"""Share a trainer's epochs, steps and batches among the replicas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from seedlora.distributed.strategies import check_batches
from seedlora.names import LONG
from seedlora.run.ensemble_options import BUDGETS, EnsembleOptions, check_choice
from seedlora.run.stack_data import Loader, StackDataModule
from seedlora.utils.options import name_option

if TYPE_CHECKING:
    import lightning.pytorch as pl


@dataclass(frozen=True)
class ReplicaBudget:
    """Limit each replica's training: whole epochs, or optimizer steps, whichever ends first; ``None`` is no limit.

    Example:
        >>> ReplicaBudget(epochs=2, steps=500).total_steps(steps_per_epoch=300)
        500
    """

    epochs: int | None = None
    steps: int | None = None

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the optimizer steps of a replica, given those of an epoch."""
        limits = [] if self.steps is None else [self.steps]
        if self.epochs is not None:
            limits.append(self.epochs * steps_per_epoch)
        return min(limits)

    def has_all_steps(self, steps: int) -> bool:
        """Return whether so many optimizer steps are all that a replica gets."""
        return self.steps is not None and steps >= self.steps

    def has_all_epochs(self, epochs: int) -> bool:
        """Return whether so many whole epochs are all that a replica gets."""
        return self.epochs is not None and epochs >= self.epochs


def replica_budget(budget: str, *, n: int, max_epochs: int | None, max_steps: int) -> ReplicaBudget:
    """Divide the trainer's ``max_epochs`` and ``max_steps`` among ``n`` replicas, or give each all of it.

    Args:
        budget: ``equal`` divides by ``n``, so that the ensemble costs what one seed would; ``full`` does not.
        n: number of seeds of the ensemble.
        max_epochs: of the trainer; ``None`` or -1 is no limit.
        max_steps: of the trainer; -1 is no limit.

    Raises:
        ValueError: for an unknown budget, no limit at all, or a limit that ``n`` does not divide.

    Example:
        >>> replica_budget("equal", n=3, max_epochs=6, max_steps=-1)
        ReplicaBudget(epochs=2, steps=None)
        >>> replica_budget("full", n=3, max_epochs=6, max_steps=-1)
        ReplicaBudget(epochs=6, steps=None)
    """
    check_choice("budget", budget, BUDGETS)
    limits = {
        "max_epochs": None if max_epochs in (None, -1) else max_epochs,
        "max_steps": None if max_steps == -1 else max_steps,
    }
    if all(limit is None for limit in limits.values()):
        raise ValueError(
            f"the run has no end: set {name_option('trainer.max_epochs')} or {name_option('trainer.max_steps')}"
        )
    for name, limit in limits.items():
        if limit == 0:
            raise ValueError(f"{name_option(f'trainer.{name}', 0)} leaves nothing to train; give at least 1")
    if budget == "equal":
        for name, limit in limits.items():
            if limit is not None and limit % n:
                raise ValueError(
                    f"{name_option('ensemble.budget', 'equal')} shares {name_option(f'trainer.{name}', limit)} among "
                    f"{n} seeds, "
                    f"which does not divide evenly; set {name_option(f'trainer.{name}')} to a multiple of {n}, or "
                    f"{name_option('ensemble.budget', 'full')} to give each seed all {limit}"
                )
        limits = {name: None if limit is None else limit // n for name, limit in limits.items()}
    return ReplicaBudget(limits["max_epochs"], limits["max_steps"])


def replica_share(options: EnsembleOptions, trainer: pl.Trainer, *, control: str | None = None) -> ReplicaBudget:
    """Return each replica's part of the trainer's epochs or steps; raises as :func:`replica_budget`.

    A trainer's ``fast_dev_run`` is one step, which cannot be shared: there every replica gets it. The control that
    trains as long as all seeds together has its trainer for itself.

    Args:
        options: of the ensemble.
        trainer: of the fit.
        control: the control that it trains; default: seeds.
    """
    return replica_budget(
        "full" if trainer.fast_dev_run or control in LONG else options.budget,
        n=len(options.replicas),
        max_epochs=trainer.max_epochs,
        max_steps=trainer.max_steps,
    )


def shared_limits(options: EnsembleOptions, trainer: pl.Trainer) -> str | None:
    """Say in a sentence what becomes of a Trainer's limits, where each replica gets a part of them."""
    n, share = len(options.seeds), replica_share(options, trainer)
    limits = {"max_epochs": (trainer.max_epochs, share.epochs), "max_steps": (trainer.max_steps, share.steps)}
    shared = {name: (given, each) for name, (given, each) in limits.items() if each is not None and each != given}
    if not shared:
        return None
    given = " and ".join(f"{name}={limit}" for name, (limit, _) in shared.items())
    units = {"max_epochs": "epoch", "max_steps": "step"}
    each = ", at most ".join(f"{part:,} {units[name]}{'' if part == 1 else 's'}" for name, (_, part) in shared.items())
    return f"The {n} seeds share {given}: each trains {each}. budget='full' gives each of them all of it."


def replica_steps(share: ReplicaBudget, trainer: pl.Trainer, data: StackDataModule) -> int:
    """Return the optimizer steps of each replica under this trainer with this data module.

    Raises:
        ValueError: as :func:`seedlora.distributed.strategies.check_batches`.
    """
    loader = data.train_dataloader()
    check_batches(trainer, limited_batches(len(loader), trainer.limit_train_batches))
    return share.total_steps(steps_per_epoch(trainer, loader))


def steps_per_epoch(trainer: pl.Trainer, loader: Loader) -> int:
    """Return the optimizer steps of an epoch of training batches; the last one may have fewer of them."""
    return -(-limited_batches(len(loader), trainer.limit_train_batches) // trainer.accumulate_grad_batches)


def limited_batches(batches: int, limit: int | float) -> int:
    """Return how many of the batches a trainer takes: a number of them, or a part.

    Example:
        >>> limited_batches(7, 5), limited_batches(7, 0.5), limited_batches(7, 1.0)
        (5, 3, 7)
    """
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)
