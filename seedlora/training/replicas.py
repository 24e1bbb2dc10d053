"""The replicas of a fit, which of them train, and the errors that end their training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypedDict, cast

from seedlora.names import SWEPT
from seedlora.utils.options import name_option


class SweptOptions(TypedDict, total=False):
    """Holds options of the module that a replica has of its own, by their names: those of :class:`ReplicaOptions`."""

    learning_rate: float
    r: int
    lora_alpha: float
    lora_plus_ratio: float
    weight_decay: float
    lr_scheduler: str
    warmup_ratio: float


@dataclass(frozen=True)
class ReplicaOptions:
    """Holds what a replica has other than the module's options: whatever leaves a forward of the base model as it is.

    The fields that :data:`seedlora.names.SWEPT` names are options of :class:`seedlora.training.module.SeedLoRAModule`;
    None leaves one as the module has it.

    Args:
        learning_rate: its own.
        r: its own rank.
        lora_alpha: its own.
        lora_plus_ratio: its own.
        weight_decay: its own.
        lr_scheduler: its own.
        warmup_ratio: its own.
        rate_factor: its learning rate is so many times what it would be.
        rank_factor: its rank and ``lora_alpha`` are so many times what they would be, also where patterns say them, at
            the same scaling.
    """

    learning_rate: float | None = None
    r: int | None = None
    lora_alpha: float | None = None
    lora_plus_ratio: float | None = None
    weight_decay: float | None = None
    lr_scheduler: str | None = None
    warmup_ratio: float | None = None
    rate_factor: float = 1.0
    rank_factor: int = 1

    @property
    def swept(self) -> SweptOptions:
        """Return the options of the module that are the replica's own."""
        own = {name: value for name in SWEPT if (value := getattr(self, name)) is not None}
        return cast("SweptOptions", own)


@dataclass(frozen=True)
class Replica:
    """Names one adapter of the stack, what its seed decides, and the options that are its own.

    Args:
        name: of the PEFT adapter.
        init_seed: of the initial weights and of the dropout.
        order_seed: of the order of the data.
        options: what it has other than the module's.
        helps: whether it is there for another one of the same fit alone, and is neither validated nor written.
    """

    name: str
    init_seed: int
    order_seed: int
    options: ReplicaOptions = ReplicaOptions()
    helps: bool = False


class StoppedError(RuntimeError):
    """Ends a run before its time, by the run's own decision. The message says why, in one sentence."""


class DivergedError(StoppedError):
    """Ends a run whose losses or weights are not finite: the same run would end so again."""


@dataclass(frozen=True)
class FitSettings:
    """Says what a fit trains: all that an ensemble decides for the module.

    Args:
        replicas: trained as one stack.
        total_steps: optimizer steps of the learning rates' schedules. Default: the trainer's estimate.
        on_divergence: of a replica whose loss or weights are not finite: ``stop`` ends the run, ``exclude`` goes on
            without it.
        shared_steps: optimizer steps at the start in which all replicas are one, which sees the rows of all.
    """

    replicas: tuple[Replica, ...] = (Replica("seed_42", 42, 42),)
    total_steps: int | None = None
    on_divergence: str = "stop"
    shared_steps: int = 0


class ReplicaStates:
    """Holds the replicas of a fit, in their order, and knows which of them train.

    A replica is active until it is stopped, because it no longer improves, or diverges. An idle one has its rows left
    out of the forward and keeps its weights. One that was stopped counts at the end of the fit, one that is left out,
    because it diverged or others were better, does not.

    Args:
        settings: the replicas, and what is done when one diverges.
    """

    def __init__(self, settings: FitSettings) -> None:
        self._replicas, self._on_divergence = settings.replicas, settings.on_divergence
        self._stopped: set[str] = set()
        #: By name, why a replica does not count, and since which optimizer step.
        self.left_out: dict[str, str] = {}

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._replicas)

    def __len__(self) -> int:
        return len(self._replicas)

    @property
    def idle(self) -> frozenset[str]:
        """Return the names of the replicas that train no more."""
        return frozenset(self._stopped | self.left_out.keys())

    @property
    def active(self) -> tuple[Replica, ...]:
        """Return the replicas that train."""
        idle = self.idle
        return tuple(replica for replica in self._replicas if replica.name not in idle)

    @property
    def active_positions(self) -> list[int]:
        """Return where the active replicas are among all: which blocks of a batch are theirs."""
        idle = self.idle
        return [i for i, replica in enumerate(self._replicas) if replica.name not in idle]

    def stop(self, name: str) -> None:
        """Make a replica idle that no longer improves."""
        self._stopped.add(name)

    def leave_out(self, reasons: Mapping[str, str]) -> None:
        """Make replicas idle that do not count at the end, by name why."""
        self.left_out |= reasons

    def exclude(self, names: Iterable[str], why: str) -> None:
        """Leave out replicas that diverged.

        Raises:
            DivergedError: if a replica that diverges is to end the run.
        """
        if self._on_divergence == "stop":
            raise DivergedError(
                f"{', '.join(names)}: {why}; lower {name_option('model.learning_rate')}, or go on without it by "
                f"{name_option('ensemble.on_divergence', 'exclude')}"
            )
        self.leave_out(dict.fromkeys(names, why))

    def restore(self, *, idle: Iterable[str], left_out: Mapping[str, str]) -> None:
        """Take up the states of a checkpoint: :attr:`idle` and :attr:`left_out` as they were."""
        self._stopped |= set(idle)
        self.leave_out(left_out)
