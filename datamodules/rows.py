"""Tokenised rows: which tokens a model sees, and which of them it is trained to say.

Shape legend: ``N`` replicas, ``b`` rows of each, ``T`` tokens of the longest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.prompts import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
#: The number of a row that fills up a rank's share of an evaluation: it holds some tokens, and none is supervised.
PADDING = -1


class Example(NamedTuple):
    """One request and the response wanted."""

    prompt: str
    response: str


class MicroBatch(NamedTuple):
    """The rows that each replica sees in one forward, and what its loss is divided by.

    Args:
        rows: ``N`` tuples of ``b`` row numbers.
        num_items: per replica, the supervised tokens of the whole optimizer step: all micro-batches, all ranks.
    """

    rows: tuple[tuple[int, ...], ...]
    num_items: tuple[int, ...]


@dataclass(frozen=True)
class TokenRows:
    """Rows of different lengths in two flat arrays.

    Args:
        tokens: all token ids, row after row.
        supervised: for each token whether its prediction is scored.
        starts: shape ``(rows + 1,)``; row ``i`` is ``tokens[starts[i]:starts[i + 1]]``.
        dropped: rows left out because no supervised token was within ``max_length``.
        cut: rows shortened to ``max_length``.
    """

    tokens: np.ndarray
    supervised: np.ndarray
    starts: np.ndarray
    dropped: int = 0
    cut: int = 0

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return np.diff(self.starts)

    @property
    def num_items(self) -> np.ndarray:
        """Supervised tokens of each row."""
        sums = np.concatenate([[0], np.cumsum(self.supervised)])
        return sums[self.starts[1:]] - sums[self.starts[:-1]]

    def padded(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The rows as input ids and labels of shape (len(rows), T), padded on the right.

        Padding is told from the end token by its label, -100, never by its id. On the right it needs no attention mask:
        a causal model's real tokens do not see it.
        """
        length = int(max(self.starts[row + 1] - self.starts[row] for row in rows))
        input_ids = torch.zeros(len(rows), length, dtype=torch.long)
        labels = torch.full((len(rows), length), IGNORED)
        for i, row in enumerate(rows):
            part = slice(self.starts[row], self.starts[row + 1])
            tokens = torch.from_numpy(self.tokens[part].astype(np.int64))
            input_ids[i, : len(tokens)] = tokens
            labels[i, : len(tokens)] = tokens.where(torch.from_numpy(self.supervised[part]), IGNORED)
        return input_ids, labels


def tokenise(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, style: str, max_length: int
) -> TokenRows:
    """Tokenise request and response as one text, followed by the end token.

    The mask follows the text, not a separately tokenised prompt: a token is supervised if it holds any character of the
    response. The end token is supervised; the model would never learn to stop otherwise.

    Raises:
        ValueError: if the tokenizer has no end token or no offsets.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end token (eos_token), so a model could not learn to stop")
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} gives no text offsets; a fast tokenizer is needed")
    prompts = [render(style, example.prompt) for example in examples]
    texts = [prompt + example.response for prompt, example in zip(prompts, examples, strict=True)]
    encoded = tokenizer(texts, return_offsets_mapping=True) if texts else {"input_ids": [], "offset_mapping": []}
    tokens: list[list[int]] = []
    supervised: list[list[bool]] = []
    dropped = cut = 0
    for prompt, ids, offsets in zip(prompts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        said = [end > len(prompt) for _, end in offsets]
        if ids[-1] != tokenizer.eos_token_id:
            ids, said = [*ids, tokenizer.eos_token_id], [*said, True]
        said[-1] = True
        if not any(said[:max_length]):
            dropped += 1
            continue
        cut += len(ids) > max_length
        tokens.append(ids[:max_length])
        supervised.append(said[:max_length])
    return TokenRows(
        np.array([t for row in tokens for t in row], dtype=np.int32),
        np.array([s for row in supervised for s in row], dtype=bool),
        np.cumsum([0, *map(len, tokens)]),
        dropped,
        cut,
    )


class ReplicaRows(Dataset[dict[str, object]]):
    """Rows as a dataset whose index is a :class:`MicroBatch` and whose item is a batch for a stack of replicas.

    An item holds ``input_ids`` and ``labels`` of shape (N, b, T), ``num_items`` of shape (N,), and ``lengths``, the
    tokens of each replica's longest row: what T would be if it were trained alone.
    """

    def __init__(self, rows: TokenRows) -> None:
        self.rows = rows
        self._lengths = rows.lengths

    def __getitem__(self, index: MicroBatch) -> dict[str, object]:
        input_ids, labels = self.rows.padded([row for replica in index.rows for row in replica])
        n = len(index.rows)
        return {
            "input_ids": input_ids.view(n, -1, input_ids.shape[1]),
            "labels": labels.view(n, -1, labels.shape[1]),
            "num_items": torch.tensor(index.num_items),
            "lengths": tuple(int(self._lengths[list(replica)].max()) for replica in index.rows),
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
