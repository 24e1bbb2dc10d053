"""Protocols of data modules: what one must offer so that a stack is trained on it, and what it may offer.

Every :class:`seedlora.datamodules.base.InstructionDataModule` offers all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    from seedlora.datamodules.sampler import Growth


class Loader(Protocol):
    """Iterate over the batches of one rank, which a sampler deals."""

    @property
    def sampler(self) -> object:
        """Return the sampler."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


@runtime_checkable
class StackDataModule(Protocol):
    """Offer what a LightningDataModule must have so that a stack can be trained on it.

    It deals the rows to the ranks itself. A training batch holds one block of rows per entry of :attr:`seeds`;
    validation and test batches are those that :meth:`seedlora.training.module.SeedLoRAModule.score_rows` takes.
    """

    #: Whose data orders the training batches hold; whoever trains sets them before the loader is asked for.
    seeds: tuple[int, ...]

    @property
    def hparams(self) -> Mapping[str, Any]:
        """Return the options that decide the rows and their order."""

    def train_dataloader(self) -> Loader:
        """Return the training batches of this rank."""

    def val_dataloader(self) -> Loader:
        """Return the validation batches of this rank; there may be none."""

    def test_dataloader(self) -> Loader:
        """Return the test batches of this rank; there may be none."""


class Counts(Protocol):
    """Count what became of the rows of a source."""

    def sentence(self) -> str:
        """Return what was left out or shortened; empty if nothing was."""


class Rows(Protocol):
    """Hold the tokenised rows of one split."""

    @property
    def lengths(self) -> np.ndarray:
        """Return the tokens of each row."""

    @property
    def num_items(self) -> np.ndarray:
        """Return the supervised tokens of each row."""

    def __len__(self) -> int: ...

    def take(self, rows: np.ndarray) -> Rows:
        """Return some of the rows, in the order given."""

    def sha256(self) -> str:
        """Return a hash that is the same for the same rows in the same order."""


@runtime_checkable
class HasRows(Protocol):
    """Offer rows that can be told apart from others of the same options."""

    @property
    def rows(self) -> Mapping[str, Rows]:
        """Return the splits ``train``, ``val`` and ``test``."""


@runtime_checkable
class HasTokens(Protocol):
    """Offer what the rows' tokens say: whether a base model has a place for them, and which rows are the same."""

    def largest_token(self) -> int:
        """Return the largest token id of all rows."""

    def check_positions(self, positions: int | None) -> None:
        """Raise ValueError if a row has more tokens than the base model has positions; None is no limit."""

    def seen_in_training(self) -> Mapping[str, int]:
        """Return how many rows of the other splits occur word for word among those of ``train``."""


@runtime_checkable
class HasPrompt(Protocol):
    """Offer a record of how the rows are worded."""

    def prompt_record(self) -> dict[str, Any]:
        """Return the wording as plain data."""


@runtime_checkable
class HasDomains(Protocol):
    """Offer the kinds of the rows."""

    def domains(self, split: str) -> dict[str, list[str]]:
        """Return what each row of a split is, by the name of the kind."""


@runtime_checkable
class HasTrainSample(Protocol):
    """Offer some training rows to be scored."""

    def train_sample(self, n: int) -> Iterable[Mapping[str, Any]]:
        """Return at most ``n`` training rows, always the same, as the validation batches come."""


@runtime_checkable
class CountsTokens(Protocol):
    """Offer, as a sampler, how much a replica has seen."""

    def seen(self, seed: int, steps: int, *, steps_per_epoch: int) -> tuple[int, int]:
        """Return the tokens that a replica has seen after so many steps, and how many of them were scored."""


@runtime_checkable
class GrowsRows(Protocol):
    """Offer, as a data module, that the rows of a step become more."""

    #: From which optimizer steps on, and how many times; None: never.
    growth: Growth | None


class Packing(Protocol):
    """Say how the training rows share a forward."""

    @property
    def joined(self) -> bool:
        """Return whether they follow each other without padding."""

    @property
    def why(self) -> str:
        """Return what was chosen and why, for people."""


@runtime_checkable
class JoinsRows(Protocol):
    """Offer to put all rows of a forward one after the other, without padding, where the model can take them."""

    #: Why it must not; None if it may. Whoever trains knows the model.
    reason_not_to_pack: str | None

    @property
    def packing(self) -> Packing:
        """Return what was chosen."""


class ForwardSize(Protocol):
    """Hold the size of one replica's part of a forward."""

    @property
    def rows(self) -> int:
        """Return its rows."""

    @property
    def length(self) -> int:
        """Return the tokens of each, padding included."""

    @property
    def scored(self) -> int:
        """Return how many of its tokens are scored."""

    @property
    def masked(self) -> bool:
        """Return whether its rows hold several samples, which attention tells apart by a mask."""

    @property
    def joined(self) -> bool:
        """Return whether its one row holds all samples, which attention takes one by one."""


class PlannedSampler(Protocol):
    """Offer, as a sampler, the shape of the batches."""

    @property
    def rows_per_step(self) -> int:
        """Return the rows of one replica in one optimizer step."""

    def largest_forwards(self, seeds: Sequence[int]) -> Sequence[ForwardSize]:
        """Return the largest parts that a replica of a stack of these seeds has in a forward."""

    def padding(self) -> float:
        """Return the part of the tokens that is padding."""


class PlannedLoader(Loader, Protocol):
    """Iterate over training batches whose shape is known."""

    @property
    def sampler(self) -> PlannedSampler:
        """Return the sampler."""


@runtime_checkable
class PlannedData(StackDataModule, Protocol):
    """Offer what a run is planned by before it starts, once the data module is set up."""

    #: Rows of one replica in one forward.
    batch_size: int

    @property
    def rows(self) -> Mapping[str, Rows]:
        """Return the splits ``train``, ``val`` and ``test``."""

    @property
    def counts(self) -> Mapping[str, Counts]:
        """Return what became of the rows of each source."""

    def train_dataloader(self) -> PlannedLoader:
        """Return the training batches of this rank."""
