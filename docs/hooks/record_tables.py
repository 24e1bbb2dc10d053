"""The tables of ``docs/run_folder.md``, made of the types in ``seedlora/records``: the site has them, the page not."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin, is_typeddict

from seedlora.records import settings
from seedlora.records.cost import COST, PlanRecord
from seedlora.records.evaluation import EVALUATION_RESULTS, EVALUATION_SETTINGS, HARNESS_RESULTS
from seedlora.records.fusion import FUSION
from seedlora.records.json_file import fields_of
from seedlora.records.owner import OWNER
from seedlora.records.report import COMPARISON_REPORT, REPORT
from seedlora.records.results import RESULTS, SampleLosses
from seedlora.records.selection import SELECTION, Selection
from seedlora.records.settings import SETTINGS, RunSettings
from seedlora.records.training import CONTROL, EXCLUDED, TRAINED, TrainedRow

#: The files by the heading of their table.
FILES = {
    "run.json": SETTINGS,
    "cost.json": COST,
    "trained.json": TRAINED,
    "excluded.json": EXCLUDED,
    "owner.json": OWNER,
    "control.json": CONTROL,
    "selection.json": SELECTION,
    "fusion.json": FUSION,
    "results.json": RESULTS,
    "evaluation/settings.json": EVALUATION_SETTINGS,
    "evaluation/results.json": EVALUATION_RESULTS,
    "evaluation/lm_eval.json": HARNESS_RESULTS,
    "report.json": REPORT,
    "report.json of several runs": COMPARISON_REPORT,
}
#: What is not told twice: the file that tells it, and how others refer to it.
TOLD = {
    Selection: ("selection.json", "as `selection.json`"),
    RunSettings: ("run.json", "as `run.json`"),
    PlanRecord: ("cost.json", "as `plan` of `cost.json`"),
    TrainedRow: ("trained.json", "as in `trained.json`"),
    SampleLosses: ("results.json", "as in `results.json`"),
}
PLAIN = {str: "text", int: "whole number", float: "number", bool: "true or false", object: "anything", Any: "anything"}


def record_table(heading: str) -> str:
    """Return the table of the file that a heading of the page names."""
    return Table(heading).text()


@dataclass(frozen=True)
class Table:
    """The table of one file: key, type and meaning of all that it holds.

    Below a key of any name stands ``*``, below a list ``[]``.
    """

    heading: str

    def text(self) -> str:
        """As Markdown."""
        content = FILES[self.heading].content
        rows = list(self._keys(content, "")) if is_typeddict(content) else [("*", *self._any_key(content))]
        rows += [] if is_typeddict(content) else self._below(content, "")
        return "\n".join(["| key | type | what |", "|---|---|---|", *(f"| `{k}` | {t} | {w} |" for k, t, w in rows)])

    def _any_key(self, content: Any) -> tuple[str, str]:
        return self._name(get_args(content)[1]), "the adapter's label is the key"

    def _keys(self, record: type, place: str) -> Iterator[tuple[str, str, str]]:
        meanings = settings.KEY_MEANINGS if record is RunSettings else documented(record)
        for key, field in fields_of(record).items():
            path = f"{place}.{key}" if place else key
            # Of run.json no key is required: other tools have files of this name. A run writes all of them.
            always = field.required or record is RunSettings
            yield path, self._name(field.kind) + ("" if always else ", not always"), meanings[key]
            yield from self._below(field.kind, path)

    def _below(self, kind: Any, path: str) -> Iterator[tuple[str, str, str]]:
        if get_origin(kind) in (Union, types.UnionType):
            for option in get_args(kind):
                yield from self._below(option, path)
        elif get_origin(kind) is dict:
            yield from self._below(get_args(kind)[1], f"{path}.*" if path else "*")
        elif get_origin(kind) is list:
            yield from self._below(get_args(kind)[0], f"{path}[]")
        elif is_typeddict(kind) and not self._told_elsewhere(kind):
            yield from self._keys(kind, path)

    def _name(self, kind: Any) -> str:
        if get_origin(kind) in (Union, types.UnionType):
            return " or ".join("null" if option is types.NoneType else self._name(option) for option in get_args(kind))
        if get_origin(kind) is dict:
            return f"by name: {self._name(get_args(kind)[1])}"
        if get_origin(kind) is list:
            return f"list: {self._name(get_args(kind)[0])}"
        if is_typeddict(kind):
            return TOLD[kind][1] if self._told_elsewhere(kind) else "object"
        return PLAIN[kind]

    def _told_elsewhere(self, kind: type) -> bool:
        return kind in TOLD and TOLD[kind][0] != self.heading


def documented(record: type) -> dict[str, str]:
    """What the docstring of a type, or of one that it extends, says of each key."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(record))).body
    found = {}
    for base in definition.bases:
        if base.id != "TypedDict":
            found |= documented(getattr(sys.modules[record.__module__], base.id))
    section = inspect.cleandoc(record.__doc__).partition("Attributes:\n")[2]
    for key, meaning in re.findall(r"^    (\w+): (.*(?:\n {6,}.*)*)", section, flags=re.M):
        found[key] = " ".join(meaning.split())
    return found
