"""A JSON file whose content has a type: the one way to read it and the one way to write it."""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Generic, NotRequired, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

from seedlora.utils.files import write_text
from seedlora.utils.places import without_home
from seedlora.utils.plain_data import from_json

#: The plain types, what JSON gives for them, and their names in a message.
_PLAIN: Mapping[object, type | tuple[type, ...]] = {bool: bool, int: int, float: (int, float), str: str}
_WORDS: Mapping[object, str] = {bool: "true or false", int: "whole number", float: "number", str: "text"}

Content = TypeVar("Content", bound=Mapping[str, object])


@dataclass(frozen=True)
class JSONFile(Generic[Content]):
    """Read and write a file of a folder, which holds one JSON object.

    Attributes:
        name: of the file, in whatever folder it is.
        content: the type of what it holds: a ``TypedDict``, or a ``dict`` of them.
        indent: spaces that each level is indented by; ``None`` writes one line.
        sort_keys: whether keys are written in the order of the alphabet, not in that of the content.
        default: makes text of a value that JSON has no form for; without it such a value is an error.
        allow_nan: whether numbers that are not finite are written; otherwise they are an error.
        hides_home: whether paths of the home folder begin with ``~``: the file is sent to others, or compared with what
            was written under another home.
    """

    name: str
    content: type[Content]
    indent: int | None = 2
    sort_keys: bool = False
    default: Callable[[object], str] | None = None
    allow_nan: bool = True
    hides_home: bool = False

    def read(self, folder: Path) -> Content | None:
        """Read the file of a folder; return ``None`` if there is no such file.

        Raises:
            ValueError: naming the file, if it holds no JSON object, or one that lacks a key which its type requires: a
                disk or a person has been there.
        """
        try:
            return self.read_file(folder / self.name)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def read_file(self, path: Path) -> Content:
        """Read a file of this kind under another name.

        Raises:
            ValueError: as :meth:`read`.
            OSError: if it is not there.
        """
        try:
            found: Content = from_json(self._for_others(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        if not isinstance(found, dict):
            raise ValueError(f"{path} cannot be read: it holds no JSON object but {str(found)[:80]}")
        if (fault := find_fault(found, self.content)) is not None:
            raise ValueError(f"{path} cannot be read: {fault}")
        return found

    def text(self, content: Content) -> str:
        """Return what the file holds, for whoever writes it together with others."""
        written = json.dumps(
            content, indent=self.indent, sort_keys=self.sort_keys, default=self.default, allow_nan=self.allow_nan
        )
        return self._for_others(written) + "\n"

    def as_read(self, content: Content) -> Content:
        """Return what a reader of the file would find: plain data."""
        found: Content = json.loads(self.text(content))
        return found

    def write(self, folder: Path, content: Content) -> None:
        """Write the file into a folder as one step; a crash leaves the old file or none, never a part.

        Raises:
            OSError: if the disk is full or the folder cannot be written; the file is then as it was.
        """
        write_text(folder / self.name, self.text(content))

    def _for_others(self, text: str) -> str:
        return without_home(text) if self.hides_home else text


def find_fault(value: object, kind: object, place: str = "") -> str | None:
    """Return what of a JSON value is not as its type says, in words; ``None`` if nothing is.

    Keys that the type does not know are let through: another version has written them.

    Args:
        value: as JSON gives it.
        kind: its type: a ``TypedDict``, ``dict[str, ...]``, ``list[...]``, a union of such, or a plain type.
        place: the keys that lead to the value, joined by dots.
    """
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        faults = [find_fault(value, option, place) for option in get_args(kind)]
        return None if None in faults else faults[0]
    if kind is types.NoneType:
        return None if value is None else f"{place} is not null"
    if is_typeddict(kind) or origin is dict:
        if not isinstance(value, dict):
            return f"{place or 'it'} is no object but {str(value)[:80]}"
        keys = fields_of(kind) if is_typeddict(kind) else {key: Field(get_args(kind)[1], True) for key in value}
        for key, field in keys.items():
            inside = f"{place}.{key}" if place else key
            if key not in value:
                if field.required:
                    return f"it has no {inside}"
            elif (fault := find_fault(value[key], field.kind, inside)) is not None:
                return fault
    if origin is list:
        if not isinstance(value, list):
            return f"{place} is no list but {str(value)[:80]}"
        faults = [find_fault(each, get_args(kind)[0], f"{place}[{i}]") for i, each in enumerate(value)]
        return next((fault for fault in faults if fault is not None), None)
    if kind in _PLAIN and (isinstance(value, bool) is not (kind is bool) or not isinstance(value, _PLAIN[kind])):
        return f"{place} is no {_WORDS[kind]} but {str(value)[:80]!r}"
    return None


@dataclass(frozen=True)
class Field:
    """Describe a key of a ``TypedDict``: the type of its value, and whether it is always there."""

    kind: object
    required: bool


@lru_cache
def fields_of(record: type) -> dict[str, Field]:
    """Return the keys of a ``TypedDict`` in their order."""
    found, required = {}, vars(record)["__required_keys__"]
    for key, hint in get_type_hints(record, include_extras=True).items():
        # Python 3.11 takes NotRequired in a module with postponed annotations for text, and counts the key as required.
        optional = get_origin(hint) is NotRequired
        kind = get_args(hint)[0] if optional else hint
        found[key] = Field(kind, not optional and key in required)
    return found
