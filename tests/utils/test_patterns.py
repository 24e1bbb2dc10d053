"""Regular expressions of strangers."""

from __future__ import annotations

import re
import time
from itertools import permutations

import pytest
from peft.utils.other import get_pattern_key

from seedlora.utils.patterns import check_pattern, pattern_key

PATH = "model.language_model.layers.31.self_attn.q_proj"


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        r"layers\.1\.mlp\.up_proj",
        r".*\.layers\.(0|1|2)\..*(self_attn|mlp).*(q|k|v)_proj",
        r"^model\.layers\.\d+\.(?:self_attn|mlp)\.\w+_proj$",
        r"(?=.*)model\.(\d+)\.",
    ],
)
def test_what_people_write_is_taken(pattern):
    check_pattern(pattern)


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(a|aa)*b", "(?:x|y.)+z", "a?" * 30 + "a" * 30, "((a{0,9}){0,9}){0,9}", ".*.*.*.*.*", "(" * 5000],
)
def test_what_could_take_for_ever_is_refused(pattern):
    with pytest.raises(ValueError, match="could take for ever|no regex"):
        check_pattern(pattern)


@pytest.mark.parametrize("pattern", ["(", "a{3,2}", "[", "(?P<a", "*"])
def test_what_is_no_expression_is_said(pattern):
    with pytest.raises(ValueError, match="it is no regex"):
        check_pattern(pattern)


@pytest.mark.parametrize("pattern", [".*.*.*!", r"(.*\.)?.*\d+(a|b)(c|d)!", r"\w*\w*\w*!"])
def test_the_slowest_that_is_taken_ends_soon(pattern):
    check_pattern(pattern)
    started = time.process_time()
    assert re.match(rf"(.*\.)?({pattern})$", PATH) is None
    assert time.process_time() - started < 1


KEYS = [
    "q_proj",
    "v_proj",
    "proj",
    r"layers\.31\..*",
    r"layers\.1\..*",
    "self_attn|mlp",
    "self_attn.q_proj",
    "",
    ".*",
    PATH,
    "^q_proj",
]


@pytest.mark.parametrize("keys", [[], *([key] for key in KEYS), *permutations(KEYS, 2)], ids=str)
def test_a_layer_has_the_rank_that_it_has_in_peft(keys):
    for path in (PATH, "q_proj", "model.layers.1.mlp.up_proj", "model.layers.1.mlp"):
        assert pattern_key(keys, path) == get_pattern_key(keys, path)
