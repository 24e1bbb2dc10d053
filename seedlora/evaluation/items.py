"""Read the items of tasks: from files, from packages, from the hub, or from a generator."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from seedlora.datamodules.row_files import KINDS, Row, files_below, read_rows, read_rows_of
from seedlora.datamodules.sources import files_of_split, names_split
from seedlora.evaluation.tasks import TASKS, Generate, Item, Task
from seedlora.records.settings import SETTINGS
from seedlora.utils.hub import hub


def load_items(
    name: str, *, path: Path | None = None, limit: int | None = None, generate: Generate | None = None
) -> list[Item]:
    """Read the items of a task, in the order of its file.

    Args:
        name: of :data:`TASKS`.
        path: a file of rows, read as training rows are, or a folder that mirrors a hub repository, whose files
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
    items = []
    for number, row in enumerate(_rows_of(name, task, path, generate)):
        if limit is not None and number >= limit:
            break
        if row.error:
            raise ValueError(f"{row.where}: {row.error}")
        try:
            items.append(task.item(number, row.value))
        except KeyError as error:
            fields = ", ".join(sorted(map(str, row.value)))
            raise ValueError(f"{row.where}: no text in field {error.args[0]}; its fields are {fields}") from None
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"{row.where}: {error}") from None
        except (TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"{row.where}: a field holds what {name} cannot use ({error})") from None
    if not items:
        raise ValueError(f"{path or name} holds no items")
    if len({item.id for item in items}) < len(items):
        raise ValueError(f"{path or name} has two rows with one task_id")
    return items


def _rows_of(name: str, task: Task, path: Path | None, generate: Generate | None) -> Iterator[Row]:
    if task.generated and generate is not None and (path is None or (path / SETTINGS.name).is_file()):
        return _numbered(name, generate(name, None if path is None else SETTINGS.read(path)))
    if path is not None and str(path) != "hub":
        return (row for file in _data_files(path) for row in read_rows(file))
    if task.packaged is not None and path is None:
        data = task.packaged.cached()
        return read_rows_of(task.packaged.path, io.BytesIO(data), size=len(data))
    if task.hub is None:
        raise ValueError(f"task {name} needs its test file; give it by task_path")
    return _numbered(name, _hub_rows(name, *task.hub))


def _numbered(name: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    return (Row(f"row {number} of {name}", dict(row), "", 0) for number, row in enumerate(rows, start=1))


def _data_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"task_path {path} does not exist")
    inside = {file.relative_to(path): file for file in files_below(path)}
    if not inside:
        raise ValueError(f"task_path {path} holds no file of rows: {KINDS}")
    tests = files_of_split(list(inside), "test")
    if len(tests) > 1 and not names_split(tests[0], "test"):
        raise ValueError(f"task_path {path} holds {len(tests)} files, and none is named test; give one of them")
    return [inside[file] for file in tests]


def _hub_rows(name: str, repo: str, configs: Sequence[str | None], split: str) -> Iterator[Mapping[str, Any]]:
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
