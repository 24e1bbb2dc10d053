"""Hold tokenised rows: which tokens a model sees, and which of them it is trained to say.

Shape legend: ``N`` replicas, ``b`` rows of each, ``T`` tokens of the longest of them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from seedlora.datamodules.prompts import Composed, PromptRecord, Turn, compose

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
#: The number of a row that fills up a rank's share of an evaluation: it holds some tokens, and none is supervised.
PADDING = -1
#: What may happen to a row of more than ``max_length`` tokens.
ON_LONG_ROW = ("cut", "drop")


class MicroBatch(NamedTuple):
    """The rows that each replica sees in one forward, and what its loss is divided by.

    Args:
        rows: ``N`` tuples of row numbers.
        num_items: per replica, the supervised tokens of the whole optimizer step: all micro-batches, all ranks.
        packs: per replica, how many of its rows follow each other in one row of the batch; ``None``: each has its own.
        joined: all rows of all replicas follow each other in one row, and nothing is padded.
    """

    rows: tuple[tuple[int, ...], ...]
    num_items: tuple[int, ...]
    packs: tuple[tuple[int, ...], ...] | None = None
    joined: bool = False

    def groups(self) -> list[list[list[int]]]:
        """Return, for each replica, the row numbers of each row of the batch."""
        sizes = self.packs or [(1,) * len(rows) for rows in self.rows]
        return [_grouped(rows, each) for rows, each in zip(self.rows, sizes, strict=True)]


def _grouped(rows: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    rest = iter(rows)
    return [list(islice(rest, size)) for size in sizes]


@dataclass(frozen=True)
class Counts:
    """Counts of what became of the rows of a source.

    Args:
        read: all of them.
        bad: left out because they could not be read; :attr:`first_bad` says what was wrong with the first.
        long: left out because they have more than ``max_length`` tokens.
        unsupervised: left out because no supervised token is within ``max_length``.
        cut: kept, but shortened to ``max_length``.
        first_bad: file and line of the first that could not be read, and why.
        empty: left out because their answers are empty, or masked by the data.
        unused: what some rows hold and nobody reads, for people, with the number of these rows.
    """

    read: int = 0
    bad: int = 0
    long: int = 0
    unsupervised: int = 0
    cut: int = 0
    first_bad: str = ""
    empty: int = 0
    unused: Mapping[str, int] = field(default_factory=dict)

    @property
    def dropped(self) -> int:
        """Return how many were left out."""
        return self.bad + self.long + self.unsupervised + self.empty

    def sentence(self) -> str:
        """Say what was left out or shortened; empty if nothing was."""
        parts = [
            (self.bad, f"unreadable (first: {self.first_bad})"),
            (self.long, "too long"),
            (self.unsupervised, "without a response within max_length"),
            (self.empty, "with no answer to learn (empty or masked)"),
        ]
        dropped = ", ".join(f"{count:,} {why}" for count, why in parts if count)
        cut = f"{self.cut:,} cut to max_length" if self.cut else ""
        unused = ", ".join(f"{what} ({count:,} rows)" for what, count in sorted(self.unused.items()))
        parts_said = (f"{dropped} left out" if dropped else "", cut, f"not used: {unused}" if unused else "")
        return "; ".join(part for part in parts_said if part)


class AskedRow(NamedTuple):
    """A row as somebody is asked it: what stands before its last answer, and that answer, as token ids."""

    item: int
    prompt: np.ndarray
    answer: np.ndarray


class PackedRows(NamedTuple):
    """Rows packed into the rows of a batch, all of shape (groups, T); labels are -100 where nothing is scored."""

    input_ids: Tensor
    labels: Tensor
    positions: Tensor


@dataclass(frozen=True)
class TokenRows:
    """Rows of different lengths in two flat arrays, which may be files mapped into memory.

    Args:
        tokens: token ids, row after row.
        supervised: for each token whether its prediction is scored.
        starts: of each row in the two.
        lengths: tokens of each row.
        num_items: supervised tokens of each row.
        numbers: of each row in its source.
        counts: what became of the source's rows.
    """

    tokens: np.ndarray
    supervised: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    num_items: np.ndarray
    numbers: np.ndarray
    counts: Counts = Counts()

    def __len__(self) -> int:
        return len(self.starts)

    def take(self, rows: np.ndarray) -> TokenRows:
        """Return some of the rows, in the order given; the tokens are not copied."""
        picked = {name: getattr(self, name)[rows] for name in ("starts", "lengths", "num_items", "numbers")}
        return replace(self, **picked)

    def row(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the token ids of one row, and which of them are supervised."""
        part = slice(int(self.starts[row]), int(self.starts[row] + self.lengths[row]))
        return self.tokens[part], self.supervised[part]

    def contents(self) -> Iterator[bytes]:
        """Give a hash of the token ids of each row, in order."""
        for row in range(len(self)):
            yield hashlib.blake2b(self.row(row)[0].tobytes(), digest_size=16).digest()

    def asked(self, row: int) -> AskedRow:
        """Return a row divided before its last answer.

        Raises:
            ValueError: if there is nothing before the answer.
        """
        ids, supervised = self.row(row)
        (at,) = np.nonzero(supervised)
        begin = int(at[np.nonzero(np.diff(at, prepend=at[0] - 2) > 1)[0][-1]])
        if begin == 0:
            raise ValueError(f"row {row} has nothing before what is trained on, so nobody can be asked it")
        return AskedRow(row, ids[:begin], ids[begin : int(at[-1]) + 1])

    def sha256(self) -> str:
        """Return the sha256 of token ids and supervised places: the same for the same rows in the same order."""
        digest = hashlib.sha256()
        for i in range(len(self)):
            ids, supervised = self.row(i)
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(ids.astype("<i4").tobytes())
            digest.update(supervised.astype(np.bool_).tobytes())
        return digest.hexdigest()

    def padded(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the rows as input ids and labels of shape (len(rows), T), padded on the right.

        Padding is told from the end token by its label, -100, never by its id. On the right it needs no attention mask:
        a causal model's real tokens do not see it.
        """
        packed = self.packed([[row] for row in rows])
        return packed.input_ids, packed.labels

    def packed(self, groups: Sequence[Sequence[int]]) -> PackedRows:
        """Put the rows of each group one after the other, as input ids, labels and positions of shape (len(groups), T).

        Positions restart at 0 with each row, and with the padding. That is how transformers' attention masks tell the
        rows of a group apart, if they are given positions and no mask.
        """
        length = max(int(self.lengths[list(group)].sum()) for group in groups)
        input_ids = torch.zeros(len(groups), length, dtype=torch.long)
        labels = torch.full((len(groups), length), IGNORED)
        positions = torch.empty(len(groups), length, dtype=torch.long)
        for i, group in enumerate(groups):
            end = 0
            for row in group:
                ids, supervised = self.row(row)
                begin, end = end, end + len(ids)
                tokens = torch.from_numpy(ids.astype(np.int64))
                input_ids[i, begin:end] = tokens
                labels[i, begin:end] = tokens.where(torch.from_numpy(np.array(supervised)), IGNORED)
                positions[i, begin:end] = torch.arange(len(ids))
            positions[i, end:] = torch.arange(length - end)
        return PackedRows(input_ids, labels, positions)


class Chunk(NamedTuple):
    """Some tokenised rows: the fields of :class:`TokenRows`, without ``starts``."""

    tokens: np.ndarray
    supervised: np.ndarray
    lengths: np.ndarray
    num_items: np.ndarray
    numbers: np.ndarray
    counts: Counts


def tokenise(
    conversations: Iterable[Sequence[Turn]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    record: PromptRecord,
    max_length: int,
    on_long_row: str = "cut",
) -> TokenRows:
    """Tokenise all rows into memory; raises as :func:`tokenise_in_chunks`."""
    composed = ((i, compose(record, turns)) for i, turns in enumerate(conversations))
    return joined(tokenise_in_chunks(composed, tokenizer, record, max_length=max_length, on_long_row=on_long_row))


def joined(chunks: Iterable[Chunk]) -> TokenRows:
    """Return the rows of chunks, in memory."""
    parts = [*chunks, empty_chunk(Counts())]
    tokens, supervised, lengths, num_items, numbers = (np.concatenate([part[i] for part in parts]) for i in range(5))
    counts = add_counts(*(part.counts for part in parts))
    return TokenRows(tokens, supervised, np.cumsum(lengths) - lengths, lengths, num_items, numbers, counts)


def add_counts(*counts: Counts) -> Counts:
    """Add the counts of several parts together."""
    keys = ("read", "bad", "long", "unsupervised", "cut", "empty")
    sums = {key: sum(getattr(c, key) for c in counts) for key in keys}
    unused: Counter[str] = sum((Counter(c.unused) for c in counts), Counter())
    return Counts(**sums, first_bad=next((c.first_bad for c in counts if c.first_bad), ""), unused=dict(unused))


def tokenise_in_chunks(
    texts: Iterable[tuple[int, Composed]],
    tokenizer: PreTrainedTokenizerBase,
    record: PromptRecord,
    *,
    max_length: int,
    on_long_row: str = "cut",
    size: int = 1000,
) -> Iterator[Chunk]:
    """Tokenise numbered texts, each followed by the end token, ``size`` at a time.

    The mask follows the text, not a separately tokenised prompt: a token is supervised if it holds any character that
    the model is to say. End tokens of answers are supervised; the model would never learn to stop otherwise. The first
    token of a row is not: nothing before it predicts it.

    Raises:
        ValueError: if the tokenizer has no end token, no offsets, or does not know its end token in a text.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end token (eos_token), so a model could not learn to stop")
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} gives no text offsets; a fast tokenizer is needed")
    rest = iter(texts)
    while batch := list(islice(rest, size)):
        encoded = tokenizer(
            [composed.text for _, composed in batch],
            add_special_tokens=record["add_special_tokens"],
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        tokens, supervised, numbers = [], [], []
        long = unsupervised = cut = 0
        for (number, composed), ids, offsets in zip(
            batch, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            row, said = _tokens_and_mask(tokenizer, ids, np.array(offsets).reshape(-1, 2), composed)
            if len(row) > max_length and on_long_row == "drop":
                long += 1
            elif not said[:max_length].any():
                unsupervised += 1
            else:
                cut += len(row) > max_length
                tokens.append(row[:max_length])
                supervised.append(said[:max_length])
                numbers.append(number)
        yield _make_chunk(tokens, supervised, numbers, Counts(len(batch), 0, long, unsupervised, cut))


def _tokens_and_mask(
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    offsets: np.ndarray,
    composed: Composed,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the token ids of one row, the end token included, and which of them are supervised."""
    row, said = np.array(ids, dtype=np.int32), np.zeros(len(ids), dtype=bool)
    text, spans = composed.text, composed.spans
    for begin, end in spans:
        said |= (offsets[:, 1] > begin) & (offsets[:, 0] < end)
    for begin, end in spans[:-1]:
        eos = str(tokenizer.eos_token)
        if text[begin:end].endswith(eos) and row[np.argmax(offsets[:, 1] >= end)] != tokenizer.eos_token_id:
            raise ValueError(
                f"the tokenizer does not read its end token '{eos}' in a text as that token, so a model could not "
                "learn to stop after the first answer of a chat"
            )
    if not len(row) or row[-1] != tokenizer.eos_token_id:
        row, said = np.append(row, np.int32(tokenizer.eos_token_id)), np.append(said, True)
    said[-1] = True
    said[0] = False
    return row, said


def token_chunk(number: int, ids: Tensor, said: Tensor, *, max_length: int, on_long_row: str) -> Chunk:
    """Return a row that is tokenised already: its tokens, and which of them a model learns to say.

    Args:
        number: of the row in its source.
        ids: shape (T,).
        said: bool, shape (T,); the first token is not learned, since nothing before it predicts it.
        max_length: tokens; what happens to a longer row is ``on_long_row``.
        on_long_row: ``cut`` or ``drop``.
    """
    row, supervised = ids.numpy().astype(np.int32), said.numpy().astype(bool)
    supervised[:1] = False
    if len(row) > max_length and on_long_row == "drop":
        return empty_chunk(Counts(read=1, long=1))
    if not supervised[:max_length].any():
        return empty_chunk(Counts(read=1, unsupervised=1))
    counts = Counts(read=1, cut=int(len(row) > max_length))
    return _make_chunk([row[:max_length]], [supervised[:max_length]], [number], counts)


def empty_chunk(counts: Counts) -> Chunk:
    """Return a chunk without rows, which only counts."""
    return _make_chunk([], [], [], counts)


def _make_chunk(tokens: list[np.ndarray], supervised: list[np.ndarray], numbers: list[int], counts: Counts) -> Chunk:
    return Chunk(
        np.concatenate([*tokens, np.empty(0, np.int32)], dtype=np.int32),
        np.concatenate([*supervised, np.empty(0, bool)], dtype=bool),
        np.array([len(row) for row in tokens], dtype=np.int64),
        np.array([said.sum() for said in supervised], dtype=np.int64),
        np.array(numbers, dtype=np.int64),
        counts,
    )


class AskedRows(Dataset[AskedRow]):
    """Rows to be answered, one by one.

    Args:
        rows: of a split.
    """

    def __init__(self, rows: TokenRows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> AskedRow:
        return self._rows.asked(row)


class ReplicaRows(Dataset[dict[str, object]]):
    """Rows as a dataset whose index is a :class:`MicroBatch` and whose item is a batch for a stack of replicas.

    An item holds ``input_ids`` and ``labels`` of shape (N, b, T), ``num_items`` of shape (N,), and ``lengths``, the
    tokens of each replica's longest row: what T would be if it were trained alone. Packed rows come with
    ``position_ids`` of shape (N, b, T) and with ``rows``, what b would be if a replica were trained alone.

    Joined rows have no padding: ``input_ids``, ``labels`` and ``position_ids`` are of shape (tokens,), one replica
    after the other, and ``documents`` holds, for each replica, the tokens of each of its rows.
    """

    def __init__(self, rows: TokenRows) -> None:
        self.rows = rows

    def __getitem__(self, index: MicroBatch) -> dict[str, object]:
        if index.joined:
            return self._joined(index)
        replicas = index.groups()
        n, most = len(replicas), max(map(len, replicas))
        # A replica that has fewer rows gets empty ones, which are all padding.
        groups = [group for replica in replicas for group in [*replica, *[[]] * (most - len(replica))]]
        packed = self.rows.packed(groups)
        lengths = self.rows.lengths
        batch: dict[str, object] = {
            "input_ids": packed.input_ids.view(n, most, -1),
            "labels": packed.labels.view(n, most, -1),
            "num_items": torch.tensor(index.num_items),
            "lengths": tuple(max(int(lengths[group].sum()) for group in replica) for replica in replicas),
        }
        if index.packs is not None:
            batch |= {"position_ids": packed.positions.view(n, most, -1), "rows": tuple(map(len, replicas))}
        return batch

    def _joined(self, index: MicroBatch) -> dict[str, object]:
        packed = self.rows.packed([[row for rows in index.rows for row in rows]])
        return {
            "input_ids": packed.input_ids[0],
            "labels": packed.labels[0],
            "position_ids": packed.positions[0],
            "num_items": torch.tensor(index.num_items),
            "documents": tuple(tuple(self.rows.lengths[list(rows)].tolist()) for rows in index.rows),
        }


class EvalRows(Dataset[dict[str, object]]):
    """Rows as a dataset whose index is a list of row numbers: ``input_ids`` and ``labels`` (b, T), ``items`` (b,).

    ``items`` are the row numbers; a row :data:`PADDING` is to be left out of every count.
    """

    def __init__(self, rows: TokenRows) -> None:
        self.rows = rows

    def __getitem__(self, index: Sequence[int]) -> dict[str, object]:
        items = torch.tensor(list(index))
        input_ids, labels = self.rows.padded(items.clamp(min=0).tolist())
        labels[items == PADDING] = IGNORED
        return {"input_ids": input_ids, "labels": labels, "items": items}
