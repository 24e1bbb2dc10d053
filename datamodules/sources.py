"""Read rows from a file, from a folder that mirrors a hub repository, or from the hub."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from seedlora.datamodules.row_files import KINDS, Row, files_below, format_of, import_optional, read_rows
from seedlora.utils.options import name_option

#: Words in a path that say what its rows are for; constraints.jsonl is not for training, latest.jsonl is no test.
_WORDS = {
    split: re.compile(rf"(?<![a-z])({words})(?![a-z])")
    for split, words in {
        "train": "train(ing|set)?",
        "val": "val(id|idation)?(set)?|dev(set)?|eval",
        "test": "test(s|ing|set)?",
    }.items()
}


@dataclass(frozen=True)
class Source:
    """The training rows of a data set.

    A local path is read as it is and never touches the network. In a folder, which may hold links, the files of
    ``subset`` are taken if some path names it, and those of ``split`` if some path has it as a word; else those that
    are of no other split.

    Args:
        path: a file as :mod:`seedlora.datamodules.row_files` reads it, or a folder of such files.
        hub: the repository to read instead, through ``datasets``.
        subset: its configuration.
        revision: its branch, tag or commit.
        split: ``train``, ``val`` or ``test``; messages call the option ``data.path``, ``data.val_path`` and so on.

    Raises:
        ValueError: if there is neither path nor hub, nothing to read at the path, or files of several formats.
    """

    path: Path | None
    hub: str | None = None
    subset: str | None = None
    revision: str = "main"
    split: str = "train"

    def __post_init__(self) -> None:
        if self.path is None:
            if self.hub is None:
                raise ValueError(
                    f"{name_option('data.path')} is missing: this data set is on no hub; give a file or folder"
                )
        elif not self.files:
            what = "holds no file of rows" if self.path.is_dir() else "is no file or folder"
            raise ValueError(f"{self.option} '{self.path}' {what}; give {KINDS}, or a folder with such files")
        elif len(kinds := sorted({format_of(file.name) for file in self.files})) > 1:
            raise ValueError(
                f"{self.option} '{self.path}' holds files of several formats ({', '.join(kinds)}), perhaps of the same "
                "rows; give a file, or a folder of one format"
            )

    @property
    def option(self) -> str:
        """Return what a user calls the path."""
        return name_option("data.path" if self.split == "train" else f"data.{self.split}_path")

    @cached_property
    def files(self) -> list[Path]:
        """Return the files to read, in order."""
        assert self.path is not None
        if not self.path.is_dir():
            return [self.path] if self.path.is_file() else []
        found = [file.relative_to(self.path) for file in files_below(self.path)]
        found = [file for file in found if self.subset in file.parts] or found
        return [self.path / file for file in files_of_split(found, self.split)]

    def fingerprint(self) -> list[str]:
        """Return what changes when the rows do: the digest of each file, or what ``datasets`` knows the rows by."""
        if self.path is None:
            return [dataset_fingerprint(self._dataset)]
        digests = []
        for file in self.files:
            with file.open("rb") as stream:
                digests.append(hashlib.file_digest(stream, "blake2b").hexdigest())
        return digests

    def rows(self) -> Iterator[Row]:
        """Give all rows in order, one in memory at a time; what is wrong with a row is in the row.

        Raises:
            ValueError: if a file is not what its name says: nothing in it can then be read.
        """
        if self.path is None:
            total = len(self._dataset)
            for i, row in enumerate(self._dataset):
                yield Row(f"{self.hub}, row {i + 1}", row, "", (i + 1) / total)
            return
        sizes = [file.stat().st_size for file in self.files]
        before, total = 0, max(1, sum(sizes))
        for file, size in zip(self.files, sizes, strict=True):
            for row in read_rows(file):
                yield row._replace(done=(before + size * row.done) / total)
            before += size

    @cached_property
    def _dataset(self) -> Any:
        datasets, hub = import_optional("datasets"), import_optional("huggingface_hub")
        offline = hub.constants.HF_HUB_OFFLINE
        try:
            try:
                hub.get_session().head(hub.constants.ENDPOINT, timeout=10)
            except Exception:
                # What is on this machine is still found; the libraries would ask six times in half a minute for more.
                hub.constants.HF_HUB_OFFLINE = True
            return datasets.load_dataset(self.hub, name=self.subset, revision=self.revision, split="train")
        except Exception as error:  # the hub's libraries raise errors of their own, of many kinds
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if hub.constants.HF_HUB_OFFLINE and not offline:
                reason = f"{hub.constants.ENDPOINT} does not answer"
            raise OSError(
                f"{self.hub} could not be read from the hub ({reason}); download it and give "
                f"{name_option('data.path', 'FILE_OR_FOLDER')}"
            ) from None
        finally:
            hub.constants.HF_HUB_OFFLINE = offline


def files_of_split(files: Sequence[Path], split: str) -> list[Path]:
    """Return the files whose path has the split as a word; where none has, those that are of no other split.

    Example:
        >>> [str(file) for file in files_of_split([Path("a.jsonl"), Path("test.jsonl")], "train")]
        ['a.jsonl']
    """
    named = [file for file in files if names_split(file, split)]
    of_none = [file for file in files if not any(names_split(file, other) for other in _WORDS)]
    return named or of_none or list(files)


def names_split(file: Path, split: str) -> bool:
    """Return whether a path has a split as a word."""
    return _WORDS[split].search(str(file).lower()) is not None


def dataset_fingerprint(dataset: Any) -> str:
    """Return what a data set of the package ``datasets`` is known by: it changes when the rows do.

    ``_fingerprint`` is no documented attribute; ``datasets`` names its own cache files after it.
    """
    return str(dataset._fingerprint)
