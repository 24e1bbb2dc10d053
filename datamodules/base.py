"""The base of all data modules: it tokenises the rows of a task once, and gives them as batches for a stack of
replicas.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import lightning.pytorch as pl
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader

from seedlora.datamodules.cache import cached_rows
from seedlora.datamodules.chat_templates import chat_record
from seedlora.datamodules.conversations import Composed, NothingToLearnError, Turn, check_turns
from seedlora.datamodules.packing import AUTO, Packing, choose_packing
from seedlora.datamodules.prompts import CHAT, PromptRecord, check_style, compose, prompt_record, trains_on_prompts
from seedlora.datamodules.row_files import Row
from seedlora.datamodules.row_forms import Columns
from seedlora.datamodules.rows import (
    ON_LONG_ROW,
    PADDING,
    AskedRow,
    AskedRows,
    Chunk,
    Counts,
    EvalRows,
    ReplicaRows,
    TokenRows,
    empty_chunk,
    tokenise_in_chunks,
)
from seedlora.datamodules.sampler import Growth, ReplicaLoader, ReplicaSampler
from seedlora.utils.options import name_option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: What a loader gives: tensors and tuples by name.
Batch: TypeAlias = dict[str, object]
_Item = TypeVar("_Item")
SPLITS = ("train", "val", "test")


class InstructionDataModule(pl.LightningDataModule, ABC):
    """Rows of one task, for a stack of replicas.

    Training batches are those of :class:`~seedlora.datamodules.rows.ReplicaRows`, one block of rows per seed in
    :attr:`seeds`, which whoever trains sets before the loader is asked for. Validation and test batches are those of
    :class:`~seedlora.datamodules.rows.EvalRows`.

    Args:
        batch_size: rows of one replica in one forward on one device. Times ``accumulate_grad_batches`` and devices it
            is the batch of an optimizer step.
        eval_batch_size: rows in one forward when scoring; each row is scored by every adapter at once.
        max_length: tokens; what happens to longer rows is ``on_long_row``.
        on_long_row: ``cut`` them to ``max_length``, or ``drop`` them.
        pack_tokens: put rows one after the other, without any seeing another, so that no time is spent on padding. The
            rows of an optimizer step stay the same. ``auto`` puts all rows of a forward into one, with no padding at
            all, where the model can keep them apart and much would be padding otherwise; a number makes rows of at most
            so many tokens; with ``None`` each row is on its own, with rows of like length together.
        style: how a conversation is worded, one of :data:`~seedlora.datamodules.prompts.STYLES`, or ``chat`` for the
            tokenizer's own chat template; ``auto`` takes ``chat`` for chats where there is such a template, else
            ``alpaca``.

    Raises:
        ValueError: for sizes below 1, an unknown style or choice, or packed rows shorter than ``max_length``.
    """

    #: What happens to a row that holds no conversation: ``error`` ends the run, ``skip`` counts it.
    on_bad_row = "error"
    #: End the run where a row holds something that nobody reads.
    strict = False
    #: Columns that this data set is known to have beside those that are trained on.
    other_columns: frozenset[str] = frozenset()
    #: Distributions whose version decides what the rows are.
    libraries: tuple[str, ...] = ()

    def __init__(
        self,
        *,
        batch_size: int,
        eval_batch_size: int,
        max_length: int,
        on_long_row: str,
        pack_tokens: int | str | None,
        style: str,
    ) -> None:
        super().__init__()
        for name, value in (
            ("batch_size", batch_size),
            ("eval_batch_size", eval_batch_size),
            ("max_length", max_length),
        ):
            if value < 1:
                raise ValueError(f"{name_option(f'data.{name}')} must be at least 1, got {value}")
        if on_long_row not in ON_LONG_ROW:
            raise ValueError(
                f"Unknown {name_option('data.on_long_row')} '{on_long_row}'; choose one of {', '.join(ON_LONG_ROW)}"
            )
        packs = name_option("data.pack_tokens")
        if isinstance(pack_tokens, str) and pack_tokens != AUTO:
            raise ValueError(f"{packs} must be {AUTO}, a number of tokens or null, got '{pack_tokens}'")
        if isinstance(pack_tokens, int) and pack_tokens < max_length:
            raise ValueError(
                f"{packs} {pack_tokens} must hold a row of {name_option('data.max_length')} {max_length} tokens"
            )
        if style != AUTO:
            check_style(style)
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.max_length, self.on_long_row, self.pack_tokens, self.style = max_length, on_long_row, pack_tokens, style
        self.seeds: tuple[int, ...] = (42,)
        #: When the rows of a step become more; whoever trains sets it with the seeds.
        self.growth: Growth | None = None
        #: Why rows must not follow each other without padding; None if they may. Whoever trains knows the model.
        self.reason_not_to_pack: str | None = "nothing is known of the model"
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self._packing: tuple[object, Packing] | None = None
        #: The splits, once set up.
        self.rows: dict[str, TokenRows] = {}
        #: What became of the rows of each source.
        self.counts: dict[str, Counts] = {}

    @abstractmethod
    def sources(self) -> Mapping[str, Any]:
        """Return what the rows come from, by name: plain data that changes whenever the rows, or what is said in them,
        do.
        """

    @abstractmethod
    def read(self, source: str) -> Iterator[Row]:
        """Give the rows of a source, in order."""

    @abstractmethod
    def turns(self, row: Mapping[str, Any]) -> Sequence[Turn]:
        """Return the conversation that a row holds; raise ValueError if it holds none."""

    @abstractmethod
    def split(self, rows: Mapping[str, TokenRows]) -> dict[str, TokenRows]:
        """Divide the tokenised sources into the splits ``train``, ``val`` and ``test``; the last two may be empty."""

    def domains(self, split: str) -> dict[str, list[str]]:  # noqa: ARG002 - a data set without sub-domains
        """Return what kind of item each row of a split is, by the name of the kind; empty where the data
        does not say.
        """
        return {}

    def tools(self, row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:  # noqa: ARG002 - most data sets have none
        """Return the schemas of the tools that the model may call in a row."""
        return ()

    def holds_chats(self) -> bool:
        """Return whether the rows are chats, which a chat template was made for."""
        return False

    def prompt_record(self) -> dict[str, Any]:
        """Return how these rows are worded, as plain data: see :mod:`seedlora.datamodules.prompts`."""
        style = self.style
        if style == AUTO:
            style = CHAT if chat_record(self._tokenizer()) is not None and self.holds_chats() else "alpaca"
        return prompt_record(style, self._tokenizer())

    def prepare_data(self) -> None:
        """Tokenise what is not on the disk yet."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002 - all splits come from one place
        """Tokenise all rows with :attr:`tokenizer`, or else that of the module in training; or read them from the disk.

        Raises:
            ValueError: if there is nothing to train on, or a row is bad and bad rows are not to be skipped.
        """
        if self.rows:
            return
        record = self.prompt_record()
        on_row = [self.on_long_row, self.on_bad_row, self.strict]
        same = [_tokenizer_fingerprint(self._tokenizer()), record, self.max_length, *on_row]
        rows = {}
        for name, source in self.sources().items():
            rows[name] = cached_rows([source, *same], partial(self._tokenise, name, record))
        splits = self.split(rows)
        self.counts = {name: part.counts for name, part in rows.items()}
        if not len(splits["train"]):
            why = "; ".join(filter(None, (counts.sentence() for counts in self.counts.values())))
            read = sum(counts.read for counts in self.counts.values())
            raise ValueError(f"{type(self).__name__} found no training rows: " + (why or f"the source has {read} rows"))
        self.rows = splits

    def largest_token(self) -> int:
        """Return the largest token id of all rows."""
        return max((int(rows.tokens.max()) for rows in self.rows.values() if len(rows)), default=0)

    def seen_in_training(self) -> dict[str, int]:
        """Return how many rows of the other splits occur word for word among those of ``train``, where there are any.

        Two rows are the same whose tokens are, answers included, as they are after long ones were cut.
        """
        trained = set(self.rows["train"].contents())
        seen = {name: sum(row in trained for row in rows.contents()) for name, rows in self.rows.items()}
        return {name: count for name, count in seen.items() if count and name != "train"}

    def check_positions(self, positions: int | None) -> None:
        """Compare the rows with the positions of a base model, before it is trained.

        Args:
            positions: that it has; None where there is no limit.

        Raises:
            ValueError: if a row has more tokens.
        """
        longest = max((int(rows.lengths.max()) for rows in self.rows.values() if len(rows)), default=0)
        if positions is not None and longest > positions:
            raise ValueError(
                f"a row has {longest:,} tokens, the base model only {positions:,} positions; give "
                f"{name_option('data.max_length')} {positions} or less: longer rows are cut, or left out with "
                f"{name_option('data.on_long_row', 'drop')}"
            )

    def _tokenise(self, source: str, record: PromptRecord) -> Iterator[Chunk]:
        """Tokenise the rows of one source; called once, and never again while they are on the disk."""
        found = _Found(self.strict)
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task(f"Tokenising {type(self).__name__} {source}".rstrip(), total=1.0)

            def texts() -> Iterator[tuple[int, Composed]]:
                for number, row in enumerate(self.read(source)):
                    progress.update(task, completed=row.done)
                    try:
                        text, unused = self._composed(row, record)
                    except NothingToLearnError as error:
                        found.nothing(row.where, error)
                    except ValueError as error:
                        found.bad.append(f"{row.where}: {error}")
                        if self.on_bad_row == "error":
                            raise ValueError(found.bad[0]) from None
                    else:
                        found.unread(row.where, unused)
                        yield number, text

            limit, on_long_row = self.max_length, self.on_long_row
            yield from tokenise_in_chunks(texts(), self._tokenizer(), record, max_length=limit, on_long_row=on_long_row)
        yield empty_chunk(found.counts())

    def _composed(self, row: Row, record: PromptRecord) -> tuple[Composed, list[str]]:
        """Return the text of a row, and what the row holds that nobody reads, for people."""
        if row.error:
            raise ValueError(row.error)
        columns = Columns(row.value)
        turns = self.turns(columns)
        kept = check_turns(turns)
        text = compose(record, kept, self.tools(columns))
        unused = [f"column {name}" for name in columns.unread() if name not in self.other_columns]
        unused += [f"field {name} of turns" for turn in turns for name in turn.unread]
        if any(turn.role == "assistant" and turn.says_nothing for turn in turns):
            unused.append("empty answers in a chat")
        return text, [*unused, *text.unwritten]

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            if self.trainer is None:
                raise ValueError("the data module needs a tokenizer: set its attribute, or use it in a Trainer")
            self.tokenizer = self.trainer.lightning_module.tokenizer
        return self.tokenizer

    @property
    def packing(self) -> Packing:
        """Return how the training rows share a forward; the same on every rank and for every stack."""
        trainer = self.trainer
        if trainer and trainer.accumulate_grad_batches < 1:
            option = name_option("trainer.accumulate_grad_batches", trainer.accumulate_grad_batches)
            raise ValueError(f"{option} leaves no batch for a step; give at least 1")
        slots = trainer.accumulate_grad_batches * trainer.world_size if trainer else 1
        asked = (self.pack_tokens, self.batch_size, slots, self.reason_not_to_pack)
        if self._packing is None or self._packing[0] != asked:
            found = choose_packing(
                self.rows["train"],
                self.pack_tokens,
                batch_size=self.batch_size,
                slots=slots,
                refused=self.reason_not_to_pack,
            )
            self._packing = asked, found
        return self._packing[1]

    def train_dataloader(self) -> ReplicaLoader:
        """Return a loader of micro-batches for the replicas of :attr:`seeds`."""
        trainer, packing = self.trainer, self.packing
        sampler = ReplicaSampler(
            self.rows["train"],
            seeds=self.seeds,
            batch_size=self.batch_size,
            pack_tokens=packing.pack_tokens,
            joined=packing.joined,
            accumulate=trainer.accumulate_grad_batches if trainer else 1,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
            epoch=trainer.current_epoch if trainer else 0,
            growth=self.growth,
        )
        return ReplicaLoader(ReplicaRows(self.rows["train"]), sampler=sampler, batch_size=None, collate_fn=_unchanged)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return a loader of the validation rows of this rank, sorted by length."""
        return self._eval_loader(self.rows["val"])

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return a loader of the test rows of this rank, sorted by length."""
        return self._eval_loader(self.rows["test"])

    def predict_dataloader(self) -> DataLoader[AskedRow]:
        """Return a loader of the test rows as lists of :class:`~seedlora.datamodules.rows.AskedRow`, in their order.

        Raises:
            ValueError: where prompts are trained on too: nobody can tell from the tokens where the answer begins.
        """
        record = self.prompt_record()
        if record and trains_on_prompts(record):
            raise ValueError(
                f"the style {record['style']} trains on prompts too, so where the answers of these rows begin is not "
                "known; ask the adapter by python -m seedlora generate --file"
            )
        return DataLoader(AskedRows(self.rows["test"]), batch_size=self.eval_batch_size, collate_fn=_unchanged)

    def train_sample(self, n: int) -> DataLoader[Batch]:
        """Return a loader of at most ``n`` training rows, always the same ones, laid out as the validation rows are."""
        rows = self.rows["train"]
        drawn = np.random.default_rng(0).permutation(len(rows))[:n]
        return self._eval_loader(rows.take(np.sort(drawn)))

    def _eval_loader(self, rows: TokenRows) -> DataLoader[Batch]:
        order = np.argsort(rows.lengths, kind="stable")
        if self.trainer:
            # The same number of rows on every rank: where the model is sharded, a rank with a forward more would wait.
            rank, ranks = self.trainer.global_rank, self.trainer.world_size
            order = np.append(order, np.full(-len(order) % ranks, PADDING))[rank::ranks]
        size = self.eval_batch_size
        batches = [order[i : i + size].tolist() for i in range(0, len(order), size)]
        return DataLoader(EvalRows(rows), sampler=batches, batch_size=None, collate_fn=_unchanged)


@dataclass
class _Found:
    """Count what becomes of rows while they are read.

    Args:
        strict: end at the first row that holds something nobody reads.
    """

    strict: bool
    bad: list[str] = field(default_factory=list)
    empty: int = 0
    unused: Counter[str] = field(default_factory=Counter)

    def nothing(self, where: str, error: Exception) -> None:
        """Count a row that has no answer to learn."""
        if self.strict:
            raise ValueError(f"{where}: {error}; {name_option('data.strict')} is true")
        self.empty += 1

    def unread(self, where: str, names: Sequence[str]) -> None:
        """Count what a row holds and nobody reads."""
        if names and self.strict:
            raise ValueError(
                f"{where}: not used: {', '.join(dict.fromkeys(names))}; {name_option('data.strict')} is true"
            )
        self.unused.update(set(names))

    def counts(self) -> Counts:
        """Return the counts of all that has no text."""
        bad, empty = len(self.bad), self.empty
        first = self.bad[0] if self.bad else ""
        return Counts(read=bad + empty, bad=bad, empty=empty, first_bad=first, unused=dict(self.unused))


def _tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a checksum that changes with anything that decides how text becomes tokens."""
    state = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    for passing in ("truncation", "padding"):
        state.pop(passing, None)
    text = json.dumps([state, str(tokenizer.eos_token)], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _unchanged(batch: _Item) -> _Item:
    return batch
