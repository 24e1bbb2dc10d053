"""Read rows from a file, from a folder that mirrors a hub repository, or from the hub."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

SUFFIXES = (".parquet", ".jsonl", ".json")
#: In a path; constraints.jsonl is not for training.
_TRAINING_IN_PATH = re.compile(r"(?<![a-z])train(ing|set)?(?![a-z])")
_NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"}
_BOM = b"\xef\xbb\xbf"


class Row(NamedTuple):
    """A row of a source, or the reason why it cannot be read.

    Args:
        where: for messages: file and line, or file and row number.
        value: the row's columns.
        error: why there are none; empty for a good row.
        done: part of the source that is read with this row, from 0 to 1.
    """

    where: str
    value: dict[str, Any]
    error: str
    done: float


@dataclass(frozen=True)
class Source:
    """The training rows of a data set.

    A local path is read as it is and never touches the network. In a folder, the files of ``subset`` are taken if some
    path names it, those for training if ``train`` is a word in some path, and of several formats parquet before JSON.

    Args:
        path: a ``.jsonl``, ``.json`` (lines or one list) or ``.parquet`` file, or a folder of them.
        hub: the repository to read instead, through ``datasets``.
        subset: its configuration.
        revision: its branch, tag or commit.

    Raises:
        ValueError: if there is neither path nor hub, or nothing to read at the path.
    """

    path: Path | None
    hub: str | None = None
    subset: str | None = None
    revision: str = "main"

    def __post_init__(self) -> None:
        if self.path is None:
            if self.hub is None:
                raise ValueError("data.path is missing: this data set is on no hub; give a file or folder")
        elif not self.files:
            kinds = ", ".join(SUFFIXES)
            what = f"holds no {kinds} file" if self.path.is_dir() else "is no file or folder"
            raise ValueError(f"data.path '{self.path}' {what}; give a {kinds} file, or a folder with such files")

    @cached_property
    def files(self) -> list[Path]:
        """Return the files to read, in order."""
        assert self.path is not None
        if not self.path.is_dir():
            return [self.path] if self.path.is_file() else []
        found = [
            file.relative_to(self.path)
            for file in sorted(self.path.rglob("*"))
            if file.suffix in SUFFIXES and file.name not in _NOT_ROWS and file.is_file()
        ]
        found = [file for file in found if not any(part.startswith(".") for part in file.parts)]
        found = [file for file in found if self.subset in file.parts] or found
        found = [file for file in found if _TRAINING_IN_PATH.search(str(file).lower())] or found
        kind = min((file.suffix for file in found), key=SUFFIXES.index, default="")
        return [self.path / file for file in found if file.suffix == kind]

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
            for row in _read_parquet(file) if file.suffix == ".parquet" else _read_json(file):
                yield row._replace(done=(before + size * row.done) / total)
            before += size

    @cached_property
    def _dataset(self) -> Any:
        datasets, hub = _import_optional("datasets"), _import_optional("huggingface_hub")
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
                f"{self.hub} could not be read from the hub ({reason}); download it and give --data.path FILE_OR_FOLDER"
            ) from None
        finally:
            hub.constants.HF_HUB_OFFLINE = offline


def dataset_fingerprint(dataset: Any) -> str:
    """Return what a data set of the package ``datasets`` is known by: it changes when the rows do.

    ``_fingerprint`` is no documented attribute; ``datasets`` names its own cache files after it.
    """
    return str(dataset._fingerprint)


def _read_json(file: Path) -> Iterator[Row]:
    """Read JSON lines, or one list of objects."""
    with file.open("rb") as stream:
        head = stream.read(4096).removeprefix(_BOM).lstrip()
    return _read_json_list(file) if head.startswith(b"[") and file.suffix == ".json" else _read_json_lines(file)


def _read_json_lines(file: Path) -> Iterator[Row]:
    size, done = max(1, file.stat().st_size), 0
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            done += len(line)
            line = line.removeprefix(_BOM).strip() if number == 1 else line.strip()
            if line:
                value, error = _parse_object(line)
                yield Row(f"{file}, line {number}", value, error, done / size)


def _parse_object(line: bytes) -> tuple[dict[str, Any], str]:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return {}, f"not UTF-8: {error.reason} at byte {error.start}"
    except json.JSONDecodeError as error:
        return {}, f"not JSON: {error.msg}"
    except RecursionError:
        return {}, "not JSON that can be read: it is nested too deeply"
    return (value, "") if isinstance(value, dict) else ({}, f"a {type(value).__name__}, not an object")


def _read_json_list(file: Path) -> Iterator[Row]:
    """Read the elements one by one: of a list of 400,000 rows only the text is in memory, not the objects."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(f"{file}, line {line} is not UTF-8: {error.reason}") from None
    decoder, at, number = json.JSONDecoder(), text.index("[") + 1, 0
    try:
        while True:
            at = _skip_spaces(text, at)
            if text[at : at + 1] == "]" and not number:
                return
            value, at = decoder.raw_decode(text, at)
            number += 1
            good = isinstance(value, dict)
            wrong = "" if good else f"a {type(value).__name__}, not an object"
            yield Row(f"{file}, row {number}", value if good else {}, wrong, at / len(text))
            at = _skip_spaces(text, at)
            if text[at : at + 1] != ",":
                break
            at += 1
        if text[at : at + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}, line {error.lineno} is not JSON: {error.msg}") from None


def _skip_spaces(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _read_parquet(file: Path) -> Iterator[Row]:
    parquet = _import_optional("pyarrow.parquet")
    try:
        table = parquet.ParquetFile(file)
        total, number = table.metadata.num_rows, 0
        for batch in table.iter_batches(batch_size=1000):
            for value in batch.to_pylist():
                number += 1
                yield Row(f"{file}, row {number}", value, "", number / total)
    except _import_optional("pyarrow").ArrowException as error:
        raise ValueError(f"{file} is not parquet: {str(error).splitlines()[0]}") from None


def _import_optional(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError:
        raise ValueError(
            f"reading the hub or parquet needs {module.partition('.')[0]}: pip install 'seedlora[hub]', "
            "or give --data.path a file of JSON lines"
        ) from None
