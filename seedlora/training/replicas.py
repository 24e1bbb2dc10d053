"""The replicas of a fit, which of them train, and the errors that end their training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from seedlora.utils.options import name_option


@dataclass(frozen=True)
class Replica:
    """Names one adapter of the stack and what its seed decides.

    Args:
        name: of the PEFT adapter.
        init_seed: of the initial weights and of the dropout.
        order_seed: of the order of the data.
    """

    name: str
    init_seed: int
    order_seed: int


class StoppedError(RuntimeError):
    """Ends a run before its time, by the run's own decision. The message says why, in one sentence."""


class DivergedError(StoppedError):
    """Ends a run whose losses or weights are not finite: the same run would end so again."""


@dataclass(frozen=True)
class FitSettings:
    """Says what a fit trains: all that an ensemble decides for the module.

    Args:
        replicas: trained as one stack.
        total_steps: optimizer steps of the learning rate's schedule. Default: the trainer's estimate.
        rank_factor: rank and ``lora_alpha`` of the replicas in units of the module's options, at the same scaling.
        on_divergence: of a replica whose loss or weights are not finite: ``stop`` ends the run, ``exclude`` goes on
            without it.
    """

    replicas: tuple[Replica, ...] = (Replica("seed_42", 42, 42),)
    total_steps: int | None = None
    rank_factor: int = 1
    on_divergence: str = "stop"


class ReplicaStates:
    """Holds the replicas of a fit, in their order, and knows which of them train.

    A replica is active until it is stopped, because it no longer improves, or diverges. An idle one has its rows left
    out of the forward and keeps its weights. One that was stopped counts at the end of the fit, one that diverged does
    not.

    Args:
        settings: the replicas, and what is done when one diverges.
    """

    def __init__(self, settings: FitSettings) -> None:
        self._replicas, self._on_divergence = settings.replicas, settings.on_divergence
        self._stopped: set[str] = set()
        #: By name, what was found in which optimizer step.
        self.diverged: dict[str, str] = {}

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._replicas)

    def __len__(self) -> int:
        return len(self._replicas)

    @property
    def idle(self) -> frozenset[str]:
        """Return the names of the replicas that train no more."""
        return frozenset(self._stopped | self.diverged.keys())

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

    def exclude(self, names: Iterable[str], why: str) -> None:
        """Make replicas idle that diverged.

        Raises:
            DivergedError: if a replica that diverges is to end the run.
        """
        if self._on_divergence == "stop":
            raise DivergedError(
                f"{', '.join(names)}: {why}; lower {name_option('model.learning_rate')}, or go on without it by "
                f"{name_option('ensemble.on_divergence', 'exclude')}"
            )
        self.diverged |= dict.fromkeys(names, why)

    def restore(self, *, idle: Iterable[str], diverged: Mapping[str, str]) -> None:
        """Take up the states of a checkpoint: :attr:`idle` and :attr:`diverged` as they were."""
        self._stopped |= set(idle)
        self.diverged |= diverged
