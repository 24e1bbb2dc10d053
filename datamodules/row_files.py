"""Read rows from files: JSON as lines, as one list or as ``{"data": [...]}``, CSV and parquet, any of them with gzip.

What a file holds is told by its content; its ending only tells CSV. One reader serves training rows, validation and
test files, and the tasks of an evaluation.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

#: Endings of files that are looked for in a folder; each but parquet may have ``.gz`` after it.
SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")
KINDS = "JSON (lines, one list, or {'data': [...]}), CSV or parquet, each but parquet also as .gz"
_NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"}
_BOM, _GZIP, _PARQUET = b"\xef\xbb\xbf", b"\x1f\x8b", b"PAR1"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
#: What a list of rows is called where it is not alone in its file.
_ROWS = ("data", "rows", "examples", "instances", "train")
_HEAD = 4096


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


def is_row_file(name: str) -> bool:
    """Return whether a file of a folder holds rows, by its name in any case.

    Example:
        >>> [is_row_file(name) for name in ("TRAIN.JSONL", "a.csv.gz", "dataset_infos.json", "README.md")]
        [True, True, False, False]
    """
    lower = name.lower()
    return lower not in _NOT_ROWS and _ending(lower) in SUFFIXES


def format_of(name: str) -> str:
    """Return ``parquet``, ``csv`` or ``json``, by the name of a row file.

    Example:
        >>> [format_of(name) for name in ("a.parquet", "b.TSV", "c.jsonl.gz")]
        ['parquet', 'csv', 'json']
    """
    ending = _ending(name.lower())
    return {".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}.get(ending, "json")


def _ending(lower: str) -> str:
    return os.path.splitext(lower.removesuffix(".gz"))[1]


def files_below(folder: Path) -> list[Path]:
    """Return all files of rows in a folder and below it, in order; links are followed, hidden files are not.

    Raises:
        ValueError: for a link that leads nowhere, or back to a folder that holds it.
    """
    found: list[Path] = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            inner = Path(place, name)
            if inner.is_symlink() and Path(place).resolve().is_relative_to(inner.resolve()):
                raise ValueError(f"{inner} is a link to a folder that holds it; remove the link")
        for name in sorted(names):
            file = Path(place, name)
            if name.startswith(".") or not is_row_file(name):
                continue
            if not file.exists():
                raise ValueError(f"{file} is a link to {os.readlink(file)}, which does not exist")
            if file.is_file():
                found.append(file)
    return sorted(found)


def read_rows(file: Path) -> Iterator[Row]:
    """Give the rows of a file in order, one in memory at a time; what is wrong with a row is in the row.

    Raises:
        ValueError: if the file is not what its name says: nothing in it can then be read.
        OSError: if it cannot be opened.
    """
    with file.open("rb") as raw:
        yield from read_rows_of(str(file), raw, size=file.stat().st_size)


def read_rows_of(name: str, raw: BinaryIO, *, size: int) -> Iterator[Row]:
    """Give the rows of an open file; raises as :func:`read_rows`.

    Args:
        name: how messages call it; tells CSV by its ending.
        raw: the file, which can be rewound.
        size: its bytes, for the progress.
    """
    begin = _peek(raw)
    try:
        stream = cast("BinaryIO", gzip.GzipFile(fileobj=raw)) if begin.startswith(_GZIP) else raw
        head = _peek(stream)
        for row in _reader(name, head)(name, stream):
            yield row._replace(done=min(1.0, raw.tell() / max(1, size))) if row.done < 0 else row
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{name} is not whole as gzip: {error}") from None


def _peek(stream: BinaryIO) -> bytes:
    head = stream.read(_HEAD)
    stream.seek(0)
    return head


def _reader(name: str, head: bytes) -> Any:
    """Choose who reads a file, by its first bytes and its name."""
    kind, start = format_of(name), head.removeprefix(_BOM).lstrip()
    if head.startswith(_UTF16) and b"\0" in head:
        raise ValueError(f"{name} is UTF-16; save it as UTF-8")
    if kind == "parquet" or head.startswith(_PARQUET):
        return _read_parquet
    if kind == "csv":
        return _read_csv
    if start.startswith(b"["):
        return _read_json_list
    if start.startswith(b"{") or is_row_file(Path(name).name) or not start:
        return _read_json_objects
    raise ValueError(f"{name} is no file of rows; those are {KINDS}")


def _read_json_objects(name: str, stream: BinaryIO) -> Iterator[Row]:
    """Read objects: one a line, or over several lines each, or one that holds all rows."""
    lines = ((number, line) for number, line in enumerate(stream, start=1))
    filled = ((number, text) for number, line in lines if (text := _stripped(number, line)))
    first = next(filled, None)
    if first is None:
        return
    value, error = _parse_object(first[1])
    if error and (objects := _objects_over_lines(name, stream, first[1])) is not None:
        yield from objects
        return
    second = next(filled, None)
    if second is None and not error:
        yield from _rows_within(name, f"{name}, line {first[0]}", value)
        return
    yield Row(f"{name}, line {first[0]}", value, error, -1)
    for number, line in chain([second] if second else [], filled):
        value, error = _parse_object(line)
        yield Row(f"{name}, line {number}", value, error, -1)


def _stripped(number: int, line: bytes) -> bytes:
    return line.removeprefix(_BOM).strip() if number == 1 else line.strip()


def _parse_object(line: bytes) -> tuple[dict[str, Any], str]:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return {}, f"not UTF-8: {error.reason} at byte {error.start}"
    except json.JSONDecodeError as error:
        return {}, f"not JSON: {error.msg}"
    except RecursionError:
        return {}, "not JSON that can be read: it is nested too deeply"
    except ValueError as error:  # a number of thousands of digits
        return {}, f"not JSON that can be read: {error}"
    return _as_row(value)


def _as_row(value: object) -> tuple[dict[str, Any], str]:
    return (value, "") if isinstance(value, dict) else ({}, f"a {type(value).__name__}, not an object")


def _rows_within(name: str, where: str, value: dict[str, Any]) -> Iterator[Row]:
    """Give the rows of the only object of a file: those in a list of it, if it is a frame around them, or itself."""
    lists = {key: rows for key, rows in value.items() if isinstance(rows, list)}
    frames = [key for key, rows in lists.items() if key in _ROWS and all(isinstance(row, dict) for row in rows)]
    if len(frames) == 1 and len(lists) == 1:
        rows = lists[frames[0]]
        for number, row in enumerate(rows, start=1):
            yield Row(f"{name}, row {number}", row, "", number / len(rows))
    elif frames:
        raise ValueError(f"{name} holds several lists ({', '.join(lists)}); put each into a file of its own")
    elif len(lists) == len(value) > 1 and all(isinstance(each, str) for rows in lists.values() for each in rows):
        raise ValueError(f"{name} is a table by columns ({', '.join(lists)}); write it by rows: {KINDS}")
    else:
        yield Row(where, value, "", 1)


def _objects_over_lines(name: str, stream: BinaryIO, first_line: bytes) -> Iterator[Row] | None:
    """Return the rows of a file whose objects go over several lines; None if its lines are what has to be read.

    That is told by the first object: it ends after its first line, or lines end by a carriage return alone.
    """
    stream.seek(0)
    try:
        text = stream.read().removeprefix(_BOM).decode("utf-8")
        _, end = json.JSONDecoder().raw_decode(text, at := _skip_spaces(text, 0))
    except (ValueError, RecursionError):
        text = ""
    if not text or ("\n" not in text[at:end] and b"\r" not in first_line):
        stream.seek(0)
        for line in stream:  # up to where the lines were read before
            if line.removeprefix(_BOM).strip() == first_line:
                break
        return None
    return _consecutive_objects(name, text)


def _consecutive_objects(name: str, text: str) -> Iterator[Row]:
    values = list(_values(name, text, _skip_spaces(text, 0), separator=""))
    for number, (value, _) in enumerate(values, start=1):
        row, error = _as_row(value)
        if len(values) == 1 and not error:
            yield from _rows_within(name, f"{name}, row 1", row)
        else:
            yield Row(f"{name}, row {number}", row, error, number / len(values))


def _read_json_list(name: str, stream: BinaryIO) -> Iterator[Row]:
    """Read the elements one by one: of a list of 400,000 rows only the text is in memory, not the objects."""
    data = stream.read().removeprefix(_BOM)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{name}, line {line} is not UTF-8: {error.reason}") from None
    for number, (value, end) in enumerate(_values(name, text, text.index("[") + 1, separator=","), start=1):
        row, wrong = _as_row(value)
        yield Row(f"{name}, row {number}", row, wrong, end / len(text))


def _values(name: str, text: str, at: int, *, separator: str) -> Iterator[tuple[object, int]]:
    """Give the JSON values from a place on, each with where it ends: up to ``]``, or to the end of the text.

    Args:
        name: of the file.
        text: of the file.
        at: where the first value begins.
        separator: the comma of a list, or nothing.

    Raises:
        ValueError: naming file and line, where it is not JSON.
    """
    decoder, close = json.JSONDecoder(), "]" if separator else ""
    try:
        if (at := _skip_spaces(text, at)) < len(text) and text[at] == close:
            at = _skip_spaces(text, at + 1)
        else:
            while True:
                value, at = decoder.raw_decode(text, at)
                yield value, at
                at = _skip_spaces(text, at)
                if close and text[at : at + 1] == close:
                    at = _skip_spaces(text, at + 1)
                    break
                if not separator and at == len(text):
                    break
                if text[at : at + 1] != separator and separator:
                    raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
                at = _skip_spaces(text, at + len(separator))
        if at < len(text):
            raise json.JSONDecodeError("something follows the list", text, at)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}, line {error.lineno} is not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        line = text.count("\n", 0, at) + 1
        raise ValueError(f"{name}, line {line} is not JSON that can be read: {error}") from None


def _skip_spaces(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _read_csv(name: str, stream: BinaryIO) -> Iterator[Row]:
    """Read a table whose first line names the columns; every value is text."""
    csv.field_size_limit(sys.maxsize)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    rows = csv.reader(text, delimiter="\t" if _ending(name.lower()) == ".tsv" else ",", strict=True)
    try:
        header = next(rows, [])
        if header[:1] == [""] and len(header) > 1:
            header[0] = "Unnamed: 0"  # the index that pandas writes, by the name under which it reads it
        if len(set(header)) < len(header) or "" in header:
            raise ValueError(f"{name}, line 1 names a column twice, or not at all: {', '.join(header)}")
        line = rows.line_num + 1
        for values in rows:
            where, line = f"{name}, line {line}", rows.line_num + 1
            if not values:
                continue
            wrong = f"{len(values)} values, where the first line names {len(header)} columns"
            good = len(values) == len(header)
            yield Row(where, dict(zip(header, values, strict=True)) if good else {}, "" if good else wrong, -1)
    except csv.Error as error:
        raise ValueError(f"{name}, line {rows.line_num} is not CSV: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}, after line {rows.line_num} is not UTF-8: {error.reason}") from None
    finally:
        text.detach()


def _read_parquet(name: str, stream: BinaryIO) -> Iterator[Row]:
    parquet, errors = import_optional("pyarrow.parquet"), import_optional("pyarrow").ArrowException
    number = 0
    try:
        table = parquet.ParquetFile(stream)
        total = table.metadata.num_rows
        for batch in table.iter_batches(batch_size=1000):
            for value in batch.to_pylist():
                number += 1
                yield Row(f"{name}, row {number}", value, "", number / total)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}, after row {number} is not UTF-8: {error.reason}") from None
    except (errors, OSError) as error:
        raise ValueError(f"{name} is not parquet: {(str(error) or 'damaged').splitlines()[0]}") from None


def import_optional(module: str) -> Any:
    """Import a module of an extra.

    Raises:
        ValueError: saying what to install, if it is not there.
    """
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise ValueError(
            f"reading the hub or parquet needs {package}: pip install {package}, or give a file of JSON lines"
        ) from None
