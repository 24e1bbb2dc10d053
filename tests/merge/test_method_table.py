"""The table of methods, which is there without their code, says of each what its code does."""

from __future__ import annotations

import pytest

from seedlora.merge.common_options import COMMON_DEFAULTS, CommonOptions
from seedlora.merge.method_table import METHOD_TABLE, check_method
from seedlora.merge.registry import METHODS


@pytest.mark.parametrize("name", METHOD_TABLE)
def test_a_row_has_the_options_of_its_functions(name):
    row, method = METHOD_TABLE[name], METHODS[name]
    assert list(row.options.items()) == list(method.options.items())
    assert [type(value) for value in row.options.values()] == [type(value) for value in method.options.values()]
    assert method.rule.__name__ == name
    assert f"{method.rule.__module__}.{name}" == f"seedlora.merge.methods.{row.rule}"


def test_common_options_are_those_of_the_class():
    assert CommonOptions(**COMMON_DEFAULTS) == CommonOptions()


def test_an_unknown_name_is_answered_with_the_one_that_was_meant():
    for name in METHOD_TABLE:
        check_method(name)
    with pytest.raises(
        ValueError, match=r"Unknown merge method 'sedlora'; choose one of .*; did you mean 'seedlora'\?"
    ):
        check_method("sedlora")
    with pytest.raises(ValueError, match=r"choose one of [a-z_, ]*$"):
        check_method("xyz")
