"""The examples in docstrings give what they say; the public face and every merge rule have one."""

from __future__ import annotations

import doctest
import re
from importlib import import_module

import pytest

import seedlora
from seedlora.merge.registry import METHODS
from tests.helpers.paths import ROOT

NUMBER = re.compile(r"(?<![\w.])-?\d+\.\d*(?:e[+-]?\d+)?")
#: What these are for takes a base model: README.md has an example of both.
WITHOUT = {"SeedLoRAModule", "SeedEnsembleCallback", "__version__"}


def modules_with_examples() -> list[str]:
    """List the modules of the package, which ``callbacks`` and ``datamodules`` are linked into."""
    files = [
        file for folder in ("seedlora", "callbacks", "datamodules") for file in sorted((ROOT / folder).rglob("*.py"))
    ]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files if ">>> " in file.read_text()]
    return [name if name.startswith("seedlora.") else f"seedlora.{name}" for name in dict.fromkeys(names)]


class Rounded(doctest.OutputChecker):
    """Takes numbers that are the same to four digits for the same, as torch prints them, and -0 for 0."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        numbers = [NUMBER.findall(text) for text in (want, got)]
        if len(numbers[0]) == len(numbers[1]):
            alike = [pytest.approx(float(a), rel=1e-4, abs=1e-4) == float(b) for a, b in zip(*numbers, strict=True)]
            if all(alike):
                want, got = ("".join(NUMBER.sub("0.", text).split()) for text in (want, got))
        return super().check_output(want, got, optionflags)


@pytest.mark.parametrize("name", modules_with_examples())
def test_the_examples_of_a_module_give_what_they_say(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(checker=Rounded())
    said = []
    for example in doctest.DocTestFinder(exclude_empty=True).find(import_module(name)):
        runner.run(example, out=said.append)
    assert runner.tries > 0, f"{name}: no docstring holds the example"
    assert runner.failures == 0, "".join(said)


def test_another_number_is_not_what_is_said():
    checker = Rounded()
    assert checker.check_output("tensor([1., 0.])\n", "tensor([1.0000, -0.0000])\n", 0)
    for other in ("tensor([1.001, 0.])\n", "tensor([1., 0., 0.])\n", "array([1., 0.])\n"):
        assert not checker.check_output("tensor([1., 0.])\n", other, 0)


@pytest.mark.parametrize("method", METHODS)
def test_every_merge_rule_has_an_example(method):
    assert f"{METHODS[method].rule.__name__}(" in "".join(re.findall(r">>> (.*)", METHODS[method].rule.__doc__ or ""))


def test_the_public_face_has_examples():
    for name in set(seedlora.__all__) - WITHOUT:
        text = seedlora.make_rule.__doc__ if name == "METHODS" else getattr(seedlora, name).__doc__
        assert re.search(rf">>> .*{name}", text), name
