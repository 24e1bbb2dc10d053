"""The base of all data modules, and the one for a user's own file."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from torch.utils.data import DataLoader

from datamodules.prompts import render
from datamodules.rows import PADDING, EvalRows, Example, ReplicaRows, TokenRows, tokenise
from datamodules.sampler import ReplicaLoader, ReplicaSampler

SPLITS = ("train", "val", "test")


class InstructionDataModule(pl.LightningDataModule, ABC):
    """Rows of one task, for a stack of replicas. A data set is a subclass with one method, :meth:`examples`.

    Training batches are those of :class:`~datamodules.rows.ReplicaRows`, one block of rows per seed in :attr:`seeds`,
    which whoever trains sets before the loader is asked for. Validation and test batches are those of
    :class:`~datamodules.rows.EvalRows`.

    Args:
        batch_size: rows of one replica in one forward on one device. Times ``accumulate_grad_batches`` and devices it
            is the batch of an optimizer step.
        eval_batch_size: rows in one forward when scoring; each row is scored by every adapter at once.
        max_length: tokens; longer rows are cut.
        style: how a request is worded, one of :data:`~datamodules.prompts.STYLES`.

    Raises:
        ValueError: for sizes below 1 or an unknown style.
    """

    def __init__(self, *, batch_size: int, eval_batch_size: int, max_length: int, style: str) -> None:
        super().__init__()
        for name, value in (
            ("batch_size", batch_size),
            ("eval_batch_size", eval_batch_size),
            ("max_length", max_length),
        ):
            if value < 1:
                raise ValueError(f"data.{name} must be at least 1, got {value}")
        render(style, "")
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.max_length, self.style = max_length, style
        self.seeds: tuple[int, ...] = (42,)
        self.tokenizer: Any = None
        self.texts: dict[str, list[Example]] = {}
        self.rows: dict[str, TokenRows] = {}

    @abstractmethod
    def examples(self) -> dict[str, list[Example]]:
        """The examples of the splits ``train``, ``val`` and ``test``; the last two may be empty."""

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002 - all splits come from one source
        """Tokenise all splits, once, with :attr:`tokenizer` or else that of the module in training.

        Raises:
            ValueError: if there is nothing to train on.
        """
        if self.rows:
            return
        if self.tokenizer is None:
            if self.trainer is None:
                raise ValueError("the data module needs a tokenizer: set its attribute, or use it in a Trainer")
            self.tokenizer = self.trainer.lightning_module.tokenizer
        self.texts = self.examples()
        if not self.texts["train"]:
            raise ValueError(f"{type(self).__name__} found no training rows")
        rows = {split: self._tokenised(self.texts[split]) for split in SPLITS}
        if not len(rows["train"]):
            raise ValueError(f"none of the {rows['train'].dropped} training rows has its response within max_length")
        self.rows = rows

    def _tokenised(self, examples: Sequence[Example]) -> TokenRows:
        assert self.tokenizer is not None
        return tokenise(examples, self.tokenizer, style=self.style, max_length=self.max_length)

    def train_dataloader(self) -> ReplicaLoader:
        """Micro-batches for the replicas of :attr:`seeds`."""
        trainer = self.trainer
        sampler = ReplicaSampler(
            self.rows["train"],
            seeds=self.seeds,
            batch_size=self.batch_size,
            accumulate=trainer.accumulate_grad_batches if trainer else 1,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
            epoch=trainer.current_epoch if trainer else 0,
        )
        return ReplicaLoader(ReplicaRows(self.rows["train"]), sampler=sampler, batch_size=None, collate_fn=_as_it_is)

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation rows of this rank, sorted by length."""
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """The test rows of this rank, sorted by length."""
        return self._eval_loader("test")

    def _eval_loader(self, split: str) -> DataLoader[Any]:
        rows = self.rows[split]
        order = np.argsort(rows.lengths, kind="stable")
        if self.trainer:
            # The same number of rows on every rank: where the model is sharded, a rank with a forward more would wait.
            rank, ranks = self.trainer.global_rank, self.trainer.world_size
            order = np.append(order, np.full(-len(order) % ranks, PADDING))[rank::ranks]
        size = self.eval_batch_size
        batches = [order[i : i + size].tolist() for i in range(0, len(order), size)]
        return DataLoader(EvalRows(rows), sampler=batches, batch_size=None, collate_fn=_as_it_is)


class InstructionData(InstructionDataModule):
    """A user's own file: JSON lines with a request and a response.

    Args:
        path: the file, one JSON object a line.
        prompt_field: where the request is.
        response_field: where the response is.
        val_fraction: part of the rows set aside for validation, chosen independently of the replicas' seeds.
        test_fraction: part set aside for the test.
        split_seed: of that choice.

    The other arguments are those of :class:`InstructionDataModule`.
    """

    def __init__(
        self,
        path: str,
        *,
        prompt_field: str = "prompt",
        response_field: str = "response",
        val_fraction: float = 0.05,
        test_fraction: float = 0.1,
        split_seed: int = 0,
        batch_size: int = 8,
        eval_batch_size: int = 16,
        max_length: int = 512,
        style: str = "alpaca",
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, max_length=max_length, style=style)
        self.save_hyperparameters()
        if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
            raise ValueError(
                f"val_fraction {val_fraction} and test_fraction {test_fraction} must leave rows to train on"
            )
        if not Path(path).is_file():
            raise ValueError(f"data.path '{path}' is no file; give a file of JSON lines")
        self.path, self.fields = Path(path), (prompt_field, response_field)
        self.fractions, self.split_seed = (val_fraction, test_fraction), split_seed

    def examples(self) -> dict[str, list[Example]]:
        """Read the file and split it.

        Raises:
            ValueError: naming file and line, for a line that is not JSON or lacks a field.
        """
        examples = [self._example(i, line) for i, line in enumerate(self._lines(), start=1) if line.strip()]
        order = np.random.default_rng(self.split_seed).permutation(len(examples)).tolist()
        num_val, num_test = (int(len(examples) * fraction) for fraction in self.fractions)
        parts = {
            "val": order[:num_val],
            "test": order[num_val : num_val + num_test],
            "train": order[num_val + num_test :],
        }
        return {split: [examples[i] for i in sorted(parts[split])] for split in SPLITS}

    def _lines(self) -> list[str]:
        try:
            return self.path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is not UTF-8: {error.reason} at byte {error.start}") from None

    def _example(self, number: int, line: str) -> Example:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.path}, line {number} is not JSON: {error.msg}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{self.path}, line {number} is a {type(row).__name__}, not an object")
        for field in self.fields:
            if not isinstance(row.get(field), str):
                found = ", ".join(sorted(row)) or "none"
                raise ValueError(f"{self.path}, line {number} has no text in field '{field}'; its fields are {found}")
        return Example(row[self.fields[0]], row[self.fields[1]])


def _as_it_is(batch: Any) -> Any:
    return batch
