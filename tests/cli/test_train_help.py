"""What train.py answers without Lightning is what its parser would answer."""

from __future__ import annotations

import inspect
import re

import pytest

from seedlora import datamodules
from seedlora.cli.parser import SeedLoRACLI
from seedlora.cli.train import main
from seedlora.cli.train_help import check_option, help_text, option_names, train_options
from seedlora.cli.train_words import keep_class
from tests.helpers.train_options import recorded_options, text_of


def without_classes(options):
    """Tests have data modules of their own, which the parser knows too."""
    return re.sub(r"known subclasses: [^)]*\)", "", text_of(options))


def test_the_file_of_options_is_what_the_parser_shows():
    again = "python -m tests.helpers.train_options writes seedlora/cli/train_options.json again"
    assert without_classes(train_options()) == without_classes(recorded_options()), again
    (shown,) = re.findall(r"known subclasses: ([^)]*)\)", text_of(train_options()))
    modules = [kind for kind in datamodules.all_data_modules() if not inspect.isabstract(kind)]
    assert sorted(shown.split(", ")) == sorted(f"seedlora.datamodules.{kind.__name__}" for kind in modules)


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("width", ["60", "130"])
def test_help(option, width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", width)
    assert main(["--model.r", "3", option]) == 0
    shown = capsys.readouterr().out
    assert shown == help_text() == SeedLoRACLI([]).parser.format_help()
    assert "--ensemble.seeds [ITEM,...]" in shown
    assert "``" not in shown
    assert max(map(len, shown.partition("one per seed")[2].splitlines())) > 0.8 * int(width)


@pytest.mark.parametrize(
    "word",
    [
        *option_names()[5:],
        "--model.r=3",
        "--data.task",
        "--data.help",
        "--model.rank_pattern.q_proj",
        "--ensemble.merge_options.p=0.5",
        "--ensemble.seeds+",
        "--trainer.of_a_later_release",
        "--print_config=skip_null",
        "[1,2]",
        "-1",
        "a=--b",
        "--",
    ],
)
def test_what_the_parser_may_know_is_left_to_it(word):
    check_option(word)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--merge", "sedlora"], "did you mean 'seedlora'? ('none' merges nothing, 'auto' and 'auto_gain' choose)"),
        (["--compare=soup,tie"], "Unknown merge method 'tie'; choose one of core_ties"),
        (["--modle.r", "3"], "unknown option --modle.r; did you mean --model.r?"),
        (["--model.rr=3"], "unknown option --model.rr; did you mean --model.r?"),
        (["--max_epochs", "3"], "unknown option --max_epochs; did you mean --trainer.max_epochs?"),
        (["test"], "test needs the run to score"),
    ],
)
def test_what_does_not_exist_is_answered_before_the_parser(words, message, capsys, monkeypatch):
    monkeypatch.setattr("seedlora.cli.training_run.SeedLoRACLI", None)
    assert main(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--merge", "sedlora"], ["--compare", "soup,tie"], ["--modle.r", "3"]])
def test_the_parser_says_the_same(words, capsys, monkeypatch):
    assert main(words) == 2
    early = capsys.readouterr().err
    monkeypatch.setattr("seedlora.cli.train.read_words", long_words)
    assert main(words) == 2
    assert capsys.readouterr().err == early


def long_words(argv):
    return [f"--ensemble.{word[2:]}" if word in ("--merge", "--compare") else word for word in argv]


def test_the_last_of_two_counts(monkeypatch):
    told = []
    monkeypatch.setattr("seedlora.cli.training_run.run", lambda words, **_: told.append(words) or 0)
    assert main(["--merge", "sedlora", "--merge=ties"]) == 0
    assert main(["--merge=ties", "--merge", "sedlora"]) == 2
    assert told == [["--ensemble.merge", "sedlora", "--ensemble.merge=ties"]]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model.optimizer", "SGD"], ["--model.optimizer", "SGD"]),
        (
            ["--model.optimizer.momentum", "0.9", "--model.optimizer=SGD"],
            ["--model.optimizer.momentum", "0.9", "--model.optimizer={class_path: SGD}"],
        ),
        (
            ["--model.optimizer", "{class_path: SGD}", "--model.optimizer.momentum=0.9"],
            ["--model.optimizer={class_path: SGD}", "--model.optimizer.momentum=0.9"],
        ),
    ],
)
def test_a_class_is_kept_beside_options_of_its_own(words, expected):
    assert keep_class(words, "--model.optimizer") == expected
