"""A sentence names options as its reader has them."""

from __future__ import annotations

import ast
import re
import shlex

import pytest

from seedlora.callbacks import SeedEnsembleCallback
from seedlora.cli.option_words import command_words
from seedlora.cli.parser import DEFAULT_DATA, SeedLoRACLI
from seedlora.cli.train import main
from seedlora.cli.train_words import expand_short_options
from seedlora.utils.options import name_option, naming_options
from tests.helpers.models import make_data, make_module
from tests.helpers.paths import ROOT
from tests.helpers.training import make_trainer

VALUES = {
    "ensemble.budget": "full",
    "ensemble.resume": True,
    "ensemble.merge_options": {"p": 0.5},
    "ensemble.patience": None,
    "ensemble.controls": "untrained",
    "ensemble.seeds": [1, 2],
    "trainer.use_distributed_sampler": False,
    "model.dtype": "float32",
}


@pytest.mark.parametrize("name", VALUES)
def test_the_words_of_the_command_line_mean_the_option(name):
    words = expand_short_options(shlex.split(command_words(name, VALUES[name])))
    assert SeedLoRACLI([]).parser.parse_args(["--data", DEFAULT_DATA, *words])[name] == VALUES[name]


@pytest.mark.parametrize("name", VALUES)
def test_the_words_of_python_mean_the_argument(name):
    assert eval(f"dict({name_option(name, VALUES[name])})") == {name.partition(".")[2]: VALUES[name]}


def test_the_way_of_naming_ends_with_its_block_even_after_an_error():
    with pytest.raises(KeyError), naming_options(command_words):
        assert name_option("ensemble.dirpath") == "--ensemble.dirpath"
        raise KeyError
    assert name_option("ensemble.dirpath") == "dirpath"


def test_the_same_refusals_name_arguments_in_python_and_options_on_the_command_line(tiny_llama, tmp_path, capsys):
    """A budget that does not divide, and a folder that holds a run: each by the one who is told."""
    options = ["--model.base_model", tiny_llama, "--data.num_train", "24", "--ensemble.seeds", "[1,2]"]
    options += ["--data.num_val", "8", "--data.num_test", "0", "--ensemble.dirpath", str(tmp_path)]

    def fit(**limits):
        callback = SeedEnsembleCallback([1, 2], dirpath=tmp_path)
        make_trainer(callback, **limits).fit(make_module(tiny_llama), datamodule=make_data())

    with pytest.raises(ValueError, match="budget='equal' shares max_epochs=3 among 2 seeds.* or budget='full' to give"):
        fit()
    assert main([*options, "--trainer.max_epochs", "3"]) == 2
    wanted = "--ensemble.budget equal shares --trainer.max_epochs 3 among 2 seeds, which does not divide evenly; set "
    assert wanted + "--trainer.max_epochs to a multiple of 2, or --ensemble.budget full" in capsys.readouterr().err
    fit(max_epochs=2)
    with pytest.raises(ValueError, match="already holds a run; go on with it by resume=True, or choose another d"):
        fit(max_epochs=2)
    assert main([*options, "--trainer.max_epochs", "2"]) == 2
    wanted = "already holds a run; go on with it by --resume, or choose another --ensemble.dirpath\n"
    assert capsys.readouterr().err.endswith(wanted)


#: A page that is stored, and commands: both have the command line's words for whoever reads them.
ON_THE_COMMAND_LINE = ("seedlora/cli/", "seedlora/report/", "seedlora/scores/train_or_fuse.py")


def sentences(tree):
    """The strings of a module that hold a space and are no documentation."""
    documented = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    docstrings = {id(node.body[0].value) for node in documented if isinstance(node.body[0], ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield from [node] if " " in node.value else []


def test_no_sentence_names_an_option_by_hand():
    """It would be in the words of one of the two readers alone."""
    dotted, found = re.compile(r"(?<![\w./`{])(model|data|trainer|ensemble)\.[a-z_]+\b(?!\()"), []
    files = [path for room in ("seedlora", "callbacks", "datamodules") for path in (ROOT / room).rglob("*.py")]
    assert len(files) > 150
    for file in files:
        name = file.relative_to(ROOT).as_posix()
        if not name.startswith(ON_THE_COMMAND_LINE):
            found += [
                f"{name}:{node.lineno}: {node.value}"
                for node in sentences(ast.parse(file.read_text()))
                if dotted.search(node.value)
            ]
    assert found == []
