"""Train a stack on the rows of any LightningDataModule."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from seedlora.datamodules.base import SPLITS, InstructionDataModule
from seedlora.datamodules.conversations import Turn
from seedlora.datamodules.packing import AUTO
from seedlora.datamodules.row_files import Row
from seedlora.datamodules.row_forms import conversation_of, is_chat, tools_of
from seedlora.datamodules.rows import IGNORED, Chunk, TokenRows, joined, token_chunk

_LOADERS = {"train": "train_dataloader", "val": "val_dataloader", "test": "test_dataloader"}
#: What a batch of tokens may hold. Lengths and types of tokens follow from the others, or change nothing here.
_TOKEN_KEYS = {"input_ids", "labels", "attention_mask", "token_type_ids", "length"}


class StackData(InstructionDataModule):
    """The rows of another data module, as batches for a stack: ``StackData(my_datamodule)``.

    Its loaders may give rows as dictionaries, in any form that
    :class:`~seedlora.datamodules.instruction_data.InstructionData` reads, one by one, in lists or collated; or batches
    of tokens as transformers takes them, ``input_ids`` with ``labels`` and ``attention_mask``, whose padding is taken
    off and whose labels say what is trained on (without labels, every token). Each split is read once, in the order of
    the data set: which seed sees which row when is decided here. A sampler of its own decides which rows there are.

    Args:
        data: the other data module.
        batch_size: rows of one replica in one forward on one device, whatever the other's loaders have.
        eval_batch_size: rows in one forward when scoring.
        max_length: tokens of a row; what happens to longer rows is ``on_long_row``.
        on_long_row: ``cut`` them to ``max_length``, or ``drop`` them.
        pack_tokens: put rows one after the other without padding where that pays (``auto``), or into rows of at most so
            many tokens; with ``None`` each is on its own.
        style: how rows are worded, as for ``InstructionData``. Batches of tokens are worded already: it then says how,
            for whoever serves the adapter; without it the record of the prompt is empty.
        strict: end the run where a row holds something that nobody reads.

    Example:
        >>> class Mine(pl.LightningDataModule):
        ...     def train_dataloader(self):
        ...         return DataLoader([{"prompt": "1+1=", "response": "2"}], collate_fn=list)
        >>> StackData(Mine(), batch_size=1).batch_size
        1
    """

    def __init__(
        self,
        data: pl.LightningDataModule,
        *,
        batch_size: int = 8,
        eval_batch_size: int = 16,
        max_length: int = 512,
        on_long_row: str = "cut",
        pack_tokens: int | str | None = "auto",
        style: str = "auto",
        strict: bool = False,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            max_length=max_length,
            on_long_row=on_long_row,
            pack_tokens=pack_tokens,
            style=style,
        )
        self.save_hyperparameters(ignore=["data"])
        self.strict, self.data = strict, data
        self._rows: dict[str, list[Mapping[str, Any]]] = {}
        self._record: dict[str, Any] | None = None

    def prepare_data(self) -> None:
        """Let the other data module prepare its data; it is tokenised in :meth:`setup`, in every process."""
        self._follow_trainer()
        self.data.prepare_data()

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002 - all splits are read at once
        """Read the other's loaders once.

        Raises:
            ValueError: if a batch is none that can be read, or there is nothing to train on.
        """
        if self.rows:
            return
        self._follow_trainer()
        for each in ("fit", "test"):
            self.data.setup(each)
        self._rows = {split: list(self._loaded(split)) for split in SPLITS}
        tokens = any("input_ids" in row for rows in self._rows.values() for row in rows[:1])
        self._record = record = {} if tokens and self.style == AUTO else self.prompt_record()
        found = {}
        for split in SPLITS:
            found[split] = joined(self._token_chunks(split) if tokens else self._tokenise(split, record))
        self.counts = {split: part.counts for split, part in found.items() if part.counts.read}
        self._rows = {}
        if not len(found["train"]):
            why = "; ".join(counts.sentence() for counts in self.counts.values())
            raise ValueError(f"{type(self.data).__name__} gave no training rows{': ' if why else ''}{why}")
        self.rows = found

    def _follow_trainer(self) -> None:
        if self.trainer is not None:
            self.data.trainer = self.trainer

    def sources(self) -> Mapping[str, Any]:
        """Return the splits; they are kept in memory, so nothing identifies them on the disk."""
        return {split: split for split in SPLITS}

    def read(self, source: str) -> Iterator[Row]:
        """Give the rows of a split."""
        rows = self._rows[source]
        for i, row in enumerate(rows):
            yield Row(f"{type(self.data).__name__}, {source} row {i + 1}", dict(row), "", (i + 1) / len(rows))

    def turns(self, row: Mapping[str, Any]) -> Sequence[Turn]:
        """Return the conversation of a row, by the columns that are there."""
        return conversation_of(row)

    def tools(self, row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        """Return what is in the column ``tools``."""
        return tools_of(row)

    def split(self, rows: Mapping[str, TokenRows]) -> dict[str, TokenRows]:
        """Return the splits, which they are already."""
        return dict(rows)

    def holds_chats(self) -> bool:
        """Return whether the first training row is a chat."""
        return bool(self._rows.get("train")) and is_chat(self._rows["train"][0])

    def prompt_record(self) -> dict[str, Any]:
        """Return how the rows are worded; nothing where the other data module did it, and no style says how."""
        return super().prompt_record() if self._record is None else self._record

    def _loaded(self, split: str) -> Iterator[Mapping[str, Any]]:
        if not is_overridden(_LOADERS[split], self.data, pl.LightningDataModule):
            return
        loaders = getattr(self.data, _LOADERS[split])()
        for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
            for batch in _batches(loader):
                yield from _rows_of(batch, f"{type(self.data).__name__}.{_LOADERS[split]}")

    def _token_chunks(self, split: str) -> Iterator[Chunk]:
        for number, row in enumerate(self._rows[split]):
            yield token_chunk(number, *_tokens_of(row), max_length=self.max_length, on_long_row=self.on_long_row)


def _batches(loader: Any) -> Iterable[Any]:
    """Return the batches of a loader in the order of its data set, those that it would drop as incomplete included."""
    if not isinstance(loader, DataLoader):
        return loader
    if isinstance(loader.dataset, IterableDataset):
        return loader
    sampler, dataset = loader.batch_sampler, loader.dataset
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a sampler that draws which rows there are draws the same in every process
        own = None if sampler is None or type(sampler) is BatchSampler else sampler
        order = sorted(loader.sampler if own is None else (i for batch in own for i in batch))
    return (loader.collate_fn(dataset[i] if sampler is None else [dataset[i]]) for i in order)


def _rows_of(batch: Any, where: str) -> Iterator[Mapping[str, Any]]:
    """Give the rows of a batch: of a list of rows, one row, or columns that were collated."""
    if isinstance(batch, list | tuple) and all(isinstance(row, Mapping) for row in batch):
        yield from batch
        return
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"{where} gives a {type(batch).__name__}; StackData reads rows as dictionaries, lists of them, or batches "
            "with input_ids"
        )
    if "input_ids" in batch:
        yield from _token_rows(batch, where)
    elif is_chat(batch) or not all(isinstance(value, list | tuple | Tensor) for value in batch.values()):
        yield batch
    else:
        if len({len(value) for value in batch.values()}) != 1:
            raise ValueError(f"{where} gives columns {', '.join(map(str, batch))} of different lengths")
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def _token_rows(batch: Mapping[str, Any], where: str) -> Iterator[Mapping[str, Any]]:
    """Give the rows of a batch of tokens, their padding taken off."""
    if odd := sorted(set(batch) - _TOKEN_KEYS):
        raise ValueError(
            f"{where} gives {', '.join(odd)} beside input_ids, which would be lost; known are "
            f"{', '.join(sorted(_TOKEN_KEYS))} (rows are packed here, by pack_tokens)"
        )
    ids, labels, mask = (
        None if batch.get(key) is None else torch.as_tensor(batch[key])
        for key in ("input_ids", "labels", "attention_mask")
    )
    assert ids is not None
    for name, tensor in (("labels", labels), ("attention_mask", mask)):
        if tensor is not None and tensor.shape != ids.shape:
            raise ValueError(f"{where} gives {name} of shape {tuple(tensor.shape)} to input_ids of {tuple(ids.shape)}")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    said = real if labels is None else labels != IGNORED
    if labels is not None and not torch.equal(labels[said], ids[said]):
        raise ValueError(f"{where} gives labels that are not the tokens at their place; they must not be shifted")
    for row in zip(*(tensor.view(-1, ids.shape[-1]) for tensor in (ids, said, real)), strict=True):
        yield dict(zip(("input_ids", "said", "real"), row, strict=True))


def _tokens_of(row: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    real = row["real"]
    return row["input_ids"][real], row["said"][real]
