"""Read the items of tasks: from files, from packages, from the hub, or from a generator."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from seedlora.evaluation.tasks import TASKS, Generate, Item, Row, Task
from seedlora.records.settings import SETTINGS
from seedlora.utils.hub import hub

#: In a path; latest.jsonl is no test.
_TEST_IN_PATH = re.compile(r"(?<![a-z])test(s|ing|set)?(?![a-z])")


def load_items(
    name: str, *, path: Path | None = None, limit: int | None = None, generate: Generate | None = None
) -> list[Item]:
    """Read the items of a task, in the order of its file.

    Args:
        name: of :data:`TASKS`.
        path: a file (jsonl, json, either with .gz, or parquet), or a folder that mirrors a hub repository, whose files
            with the word ``test`` in their path are read, or ``hub``. Default: the packaged file, else the hub. For a
            generated task also the folder of a run that was trained on it; default: the test split of the data
            module's options.
        limit: only so many of the first.
        generate: makes the rows of generated tasks.

    Raises:
        ValueError: if there are no items, or a row cannot be used; the message names it.
        OSError: if they cannot be read or fetched.
    """
    task = TASKS[name]
    rows = _rows_of(name, task, path, generate)
    items = []
    for number, row in enumerate(rows):
        if limit is not None and number >= limit:
            break
        try:
            items.append(task.item(number, row))
        except KeyError as error:
            raise ValueError(
                f"row {number + 1} of {path or name} has no text in field {error.args[0]}; its fields are "
                f"{', '.join(sorted(map(str, row)))}"
            ) from None
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"row {number + 1} of {path or name} {error}") from None
    if not items:
        raise ValueError(f"{path or name} holds no items")
    if len({item.id for item in items}) < len(items):
        raise ValueError(f"{path or name} has two rows with one task_id")
    return items


def _rows_of(name: str, task: Task, path: Path | None, generate: Generate | None) -> Iterator[Row]:
    if task.generated and generate is not None and (path is None or (path / SETTINGS.name).is_file()):
        return iter(generate(name, None if path is None else SETTINGS.read(path)))
    if path is not None and str(path) != "hub":
        files = _data_files(path)
        return (row for file in files for row in _file_rows(str(file), file.read_bytes()))
    if task.packaged is not None and path is None:
        return _file_rows(task.packaged.path, task.packaged.cached())
    if task.hub is None:
        raise ValueError(f"task {name} needs its test file; give it by task_path")
    return _hub_rows(name, *task.hub)


def _data_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"task_path {path} does not exist")
    kinds = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")
    found = sorted(file for file in path.rglob("*") if file.name.endswith(kinds) and file.is_file())
    tests = [file for file in found if _TEST_IN_PATH.search(str(file.relative_to(path)).lower())]
    if not (tests or found):
        raise ValueError(f"task_path {path} holds no {', '.join(kinds)}")
    if not tests and len(found) > 1:
        raise ValueError(f"task_path {path} holds {len(found)} files, and none is named test; give one of them")
    return tests or found


def _file_rows(name: str, data: bytes) -> Iterator[Row]:
    if name.endswith(".parquet"):
        yield from _parquet_rows(name, data)
        return
    try:
        text = (gzip.decompress(data) if name.endswith(".gz") else data).decode("utf-8")
        rows = json.loads(text) if name.removesuffix(".gz").endswith(".json") else None
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from None
    except (json.JSONDecodeError, gzip.BadGzipFile) as error:
        raise ValueError(f"{name} cannot be read: {error}") from None
    if rows is None:
        rows = (line for line in enumerate(text.split("\n"), start=1) if line[1].strip())
        rows = (_json_line(name, *line) for line in rows)
    elif isinstance(rows, dict):
        rows = [rows]  # one item per file, as MATH came first
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise ValueError(f"{name}, row {number} is a {type(row).__name__}, not an object")
        yield row


def _json_line(name: str, number: int, line: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}, line {number} is not JSON: {error.msg}") from None


def _parquet_rows(name: str, data: bytes) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{name}: reading parquet needs the package pyarrow") from None
    yield from pyarrow.parquet.read_table(pyarrow.BufferReader(data)).to_pylist()


def _hub_rows(name: str, repo: str, configs: Sequence[str | None], split: str) -> Iterator[Row]:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"task {name} comes from the hub, which needs the package datasets; or give --task_path {name}=FILE"
        ) from None
    for config in configs:
        try:
            with hub():
                rows = datasets.load_dataset(repo, config, split=split)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise OSError(
                f"task {name} could not be read from the hub ({repo}: {reason}); give --task_path {name}=FILE"
            ) from None
        yield from rows
