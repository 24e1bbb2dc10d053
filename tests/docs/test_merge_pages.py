"""The documentation says what the code does: every code block runs, every method and option has its entry."""

import re

import pytest

from seedlora.merge.common_options import COMMON_DEFAULTS
from seedlora.merge.registry import METHODS
from tests.helpers.paths import DOCS


def test_the_page_on_new_methods_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "add_a_merge_method.md").read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 3
    names = {}
    exec("\n".join(blocks), names)
    assert set(names["fused"]) == set(names["stacks"])
    assert "model.layers.0.mlp.up_proj" in capsys.readouterr().out


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_an_entry(name):
    text = (DOCS / "methods.md").read_text(encoding="utf-8")
    entry = re.search(rf"^### {name}\n(.*?)(?=^##)", text, re.S | re.M)
    assert entry, f"docs/methods.md has no entry '### {name}'"
    for word in ("Source", "ost"):
        assert word in entry[1]
    for option in METHODS[name].options:
        assert option == "generator" or f"`{option}`" in entry[1], f"{name}: {option} is not explained"


def test_common_options_are_explained():
    text = (DOCS / "methods.md").read_text(encoding="utf-8")
    assert all(f"| `{option}` |" in text for option in COMMON_DEFAULTS)
