"""The stored files: one reader and one writer."""

from __future__ import annotations

import json
import re
from typing import NotRequired, TypedDict

import pytest

from seedlora.records.json_file import JSONFile


class Part(TypedDict):
    """A part."""

    n: int
    more: NotRequired[list[int]]


class Whole(TypedDict):
    """With what a file may have in it."""

    part: Part
    parts: dict[str, list[Part]]
    perhaps: Part | None


WHOLE = JSONFile("whole.json", Whole)
GOOD = {"part": {"n": 1}, "parts": {"a": [{"n": 1, "more": [2]}]}, "perhaps": None, "of a later version": 3}


def test_what_is_written_is_read(tmp_path):
    assert WHOLE.read(tmp_path) is None
    WHOLE.write(tmp_path, GOOD)
    assert WHOLE.read(tmp_path) == GOOD
    assert (tmp_path / "whole.json").read_text() == json.dumps(GOOD, indent=2) + "\n"
    assert [path.name for path in tmp_path.iterdir()] == ["whole.json"]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('{"part": ', "Expecting value: line 1 column 10"),
        ("[1]", r"it holds no JSON object but \[1\]"),
        ("{}", "it has no part$"),
        (json.dumps(GOOD | {"part": {}}), r"it has no part\.n$"),
        (json.dumps(GOOD | {"parts": {"a": [{"n": 1}, {"m": 1}]}}), r"it has no parts\.a\[1\]\.n$"),
        (json.dumps(GOOD | {"parts": {"a": {"n": 1}}}), r"parts\.a is no list but \{'n': 1\}$"),
        (json.dumps(GOOD | {"perhaps": {"m": 1}}), r"it has no perhaps\.n$"),
        (json.dumps(GOOD | {"part": 7}), "part is no object but 7$"),
        (json.dumps(GOOD | {"part": {"n": "1"}}), r"part\.n is no whole number but '1'$"),
        (json.dumps(GOOD | {"part": {"n": True}}), r"part\.n is no whole number but 'True'$"),
        (
            json.dumps(GOOD | {"parts": {"a": [{"n": 1, "more": [2.5]}]}}),
            r"parts\.a\[0\]\.more\[0\] is no whole number",
        ),
        ("[" * 100_000, "it is nested too deeply"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_fault(tmp_path, content, fault):
    (tmp_path / "whole.json").write_text(content)
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))}/whole\.json cannot be read: {fault}"):
        WHOLE.read(tmp_path)
