"""Data sets whose rows have named columns: on the hub, in a file, or in a folder that mirrors the hub."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from seedlora.datamodules.base import SPLITS, InstructionDataModule
from seedlora.datamodules.cache import cached_rows
from seedlora.datamodules.mixing import check_mix, one_after_the_other, taken_by_weight
from seedlora.datamodules.row_files import Row
from seedlora.datamodules.rows import TokenRows
from seedlora.datamodules.sources import Source
from seedlora.utils.options import name_option

ON_BAD_ROW = ("error", "skip")
#: Options that do not decide what the rows say.
_OPTIONS_OUTSIDE_THE_ROWS = {
    *("path", "revision", "num_train", "val_fraction", "test_fraction", "split_seed", "on_bad_row"),
    *("batch_size", "eval_batch_size", "max_length", "on_long_row", "pack_tokens", "style", "strict"),
    *("val_path", "test_path", "mix"),
}


class TableDataModule(InstructionDataModule):
    """The base of data sets with named columns. One of them is a subclass that says :attr:`hub` and :meth:`turns`.

    The splits are drawn from the rows of the source with ``split_seed``, independently of the replicas' seeds, of the
    tokenizer and of the options that leave rows out: first validation, then test, then training rows. With files of
    their own for validation or test nothing is drawn for these.

    Args:
        path: a file as :mod:`seedlora.datamodules.row_files` reads it, or a folder that mirrors the hub repository;
            nothing is downloaded then. Default: the hub.
        revision: branch, tag or commit of the hub repository.
        num_train: training rows, drawn by ``split_seed``; default all.
        val_fraction: part of the rows set aside for validation.
        test_fraction: part set aside for the test.
        split_seed: of the splits.
        on_bad_row: ``error`` stops at a row that cannot be read, ``skip`` leaves it out and counts it.
        val_path: a file or folder of validation rows, in the place of ``val_fraction``.
        test_path: a file or folder of test rows, in the place of ``test_fraction``.
        mix: more training data, paths with weights: how often each row of theirs is in an epoch, beside those of
            ``path``, which are in it once. ``{"more.jsonl": 0.5}`` takes a drawn half.
        strict: end the run where a row holds something that nobody reads, instead of saying so once with a count.
        batch_size: rows of one replica in one forward on one device.
        eval_batch_size: rows in one forward when scoring.
        max_length: tokens of a row; what happens to longer rows is ``on_long_row``.
        on_long_row: ``cut`` them to ``max_length``, or ``drop`` them.
        pack_tokens: put rows one after the other without padding where that pays (``auto``), or into rows of at most so
            many tokens; with ``None`` each is on its own.
        style: ``plain``, ``alpaca``, ``alpaca_split``, ``tulu``, ``llm_adapters``, or ``chat`` for the tokenizer's own
            template; default: the data set's own.

    Raises:
        ValueError: for a path with nothing to read, or fractions that leave nothing to train on.
    """

    #: The repository on the hub, ``None`` if there is none.
    hub: str | None = None
    #: Its configuration.
    subset: str | None = None
    #: The style if none is asked for.
    own_style = "alpaca"

    def __init__(
        self,
        path: str | None = None,
        *,
        revision: str = "main",
        num_train: int | None = None,
        val_fraction: float = 0.005,
        test_fraction: float = 0.0,
        split_seed: int = 0,
        on_bad_row: str = "error",
        batch_size: int = 8,
        eval_batch_size: int = 16,
        max_length: int = 512,
        on_long_row: str = "cut",
        pack_tokens: int | str | None = "auto",
        style: str | None = None,
        strict: bool = False,
        val_path: str | None = None,
        test_path: str | None = None,
        mix: dict[str, float] | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            max_length=max_length,
            on_long_row=on_long_row,
            pack_tokens=pack_tokens,
            style=style or self.own_style,
        )
        self.save_hyperparameters()
        if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
            raise ValueError(
                f"{name_option('data.val_fraction')} {val_fraction} and {name_option('data.test_fraction')} "
                f"{test_fraction} must leave rows to train on"
            )
        if num_train is not None and num_train < 1:
            raise ValueError(f"{name_option('data.num_train')} must be at least 1, got {num_train}")
        if on_bad_row not in ON_BAD_ROW:
            raise ValueError(
                f"Unknown {name_option('data.on_bad_row')} '{on_bad_row}'; choose one of {', '.join(ON_BAD_ROW)}"
            )
        self.on_bad_row, self.strict, self.num_train = on_bad_row, strict, num_train
        self.split_seed, self.mix = split_seed, dict(mix or {})
        check_mix(self.mix)
        self.fractions = (0.0 if val_path else val_fraction, 0.0 if test_path else test_fraction)
        self.source = Source(Path(path).expanduser() if path else None, self.hub, self.subset, revision)
        #: All sources by name: the training rows are those of the first, and of ``mix``.
        self.files = {"": self.source}
        for more in self.mix:
            self.files[more] = Source(Path(more).expanduser(), subset=self.subset)
        for split, own in (("val", val_path), ("test", test_path)):
            if own:
                self.files[f"{split}_path"] = Source(Path(own).expanduser(), subset=self.subset, split=split)

    def sources(self) -> Mapping[str, Any]:
        """Return the sources: beside its content, the code and the options that make conversations of it."""
        options = {key: value for key, value in self.hparams.items() if key not in _OPTIONS_OUTSIDE_THE_ROWS}
        try:
            code = inspect.getsource(type(self))
        except (OSError, TypeError):  # typed at a prompt
            code = repr(type(self))
        return {name: [source.fingerprint(), code, options] for name, source in self.files.items()}

    def read(self, source: str) -> Iterator[Row]:
        """Give the rows of a source."""
        return self.files[source].rows()

    def domains(self, split: str) -> dict[str, list[str]]:
        """Return of which data set each row is, where several are mixed and the split is drawn from them."""
        if not self.mix or f"{split}_path" in self.files:
            return {}
        paths = [str(self.source.path or self.hub), *self.mix]
        short = [Path(path).name for path in paths]
        names = short if len({*short}) == len(short) else paths
        sets = np.searchsorted(self._ends, self.rows[split].numbers, side="right")
        return {"data set": [names[place] for place in sets]}

    def split(self, rows: Mapping[str, TokenRows]) -> dict[str, TokenRows]:
        """Draw the splits from the training sources, the rows left out included; or take the files given for them.

        Raises:
            ValueError: if there are fewer than ``num_train`` rows to train on.
        """
        parts = [rows[name] for name in ("", *self.mix)]
        self._ends = np.cumsum([part.counts.read for part in parts])
        found = parts[0]
        if self.mix:
            known = [[part.sha256(), sha256(part.numbers.tobytes()).hexdigest(), part.counts.read] for part in parts]
            key = ["mix", known]
            found = cached_rows(key, partial(one_after_the_other, parts))
        order = np.random.default_rng(self.split_seed).permutation(found.counts.read)
        num_val, num_test = (int(len(order) * fraction) for fraction in self.fractions)
        drawn = np.split(order, [num_val, num_val + num_test])
        kept = np.full(len(order), -1)
        kept[found.numbers] = np.arange(len(found))
        val, test, train = (kept[part][kept[part] >= 0] for part in drawn)
        if self.mix:
            sets = np.searchsorted(self._ends, found.numbers[train], side="right")
            train = taken_by_weight(train, sets, [1.0, *self.mix.values()], self.split_seed)
            train = np.random.default_rng([self.split_seed, len(parts)]).permutation(train)
        if self.num_train is not None:
            if len(train) < self.num_train:
                raise ValueError(
                    f"{name_option('data.num_train')} asks for {self.num_train} rows, there are {len(train)} to train "
                    "on"
                )
            train = train[: self.num_train]
        chosen = {"train": train, "val": val, "test": test}
        own = {split: rows[f"{split}_path"] for split in SPLITS if f"{split}_path" in rows}
        return {split: own[split] if split in own else found.take(np.sort(chosen[split])) for split in SPLITS}
