"""Show the options of ``train.py`` without making its parser.

The parser is made from signatures of Lightning's classes, and Lightning takes seconds to import. What the parser would
show lies in ``train_options.json``; a test compares the two, and ``python -m tests.helpers.train_options`` writes the
file again.
"""

from __future__ import annotations

import argparse
import json
import re
from functools import cache
from importlib.resources import files
from typing import TypedDict

from seedlora.cli.errors import UsageError
from seedlora.cli.option_words import SHORT
from seedlora.utils.spelling import closest

USAGE = """\
Train LoRA replicas of one task with different seeds as one stack, and merge them into one adapter:
python -m seedlora train ..., or python train.py ... in a checkout

  --merge seedlora                          SmolLM2-135M on embedded data, seeds 11, 42, 202
  --merge soup --ensemble.seeds "[1,2,3]" --trainer.max_epochs 6
  --config configs/default.yaml --model.r 16
  --merge auto --compare ties,knots_ties    the method that is best on validation rows; others beside it
  --merge seedlora --controls               one seed for all tokens, one of all ranks, and other controls
  --merge seedlora --resume                 go on with the newest unfinished run
  --merge seedlora --plan                   what the run will take, measured on a few steps, in a minute
  --evaluate gsm8k --evaluate.limit 100     then score all adapters on GSM8K
  test --ensemble.dirpath RUN               score a finished run again, without training
"""
TRAINER_SHOWN = ("max_epochs", "max_steps", "accelerator", "devices", "strategy", "accumulate_grad_batches")
#: Beginnings of options that are groups of others, and read a file of them by themselves.
_GROUPS = ("--model", "--ensemble", "--trainer")


class ShownOption(TypedDict):
    """An option as the help shows it: its names, what stands for its value, and its text."""

    names: list[str]
    value: str | None
    help: str


class OptionGroup(TypedDict):
    """A group of options in the help."""

    title: str
    options: list[ShownOption]


class TrainOptions(TypedDict):
    """The content of ``train_options.json``: the groups that the help shows, and the names of all options."""

    groups: list[OptionGroup]
    names: list[str]


@cache
def train_options() -> TrainOptions:
    """Read the options of ``train.py``."""
    text = (files("seedlora.cli") / "train_options.json").read_text(encoding="utf-8")
    options: TrainOptions = json.loads(text)
    return options


def help_text() -> str:
    """Return what ``--help`` prints, at the width of the terminal."""
    shown = [USAGE]
    for group in train_options()["groups"]:
        parser = argparse.ArgumentParser(add_help=False, usage=argparse.SUPPRESS)
        section = parser.add_argument_group(group["title"])
        for option in group["options"]:
            text = option["help"].replace("``", "").replace("%", "%%")
            if option["value"] is None:
                section.add_argument(*option["names"], action="store_true", help=text)
            else:
                section.add_argument(*option["names"], metavar=option["value"], help=text)
        shown.append(parser.format_help())
    trainer = ", ".join(f"--trainer.{name}" for name in TRAINER_SHOWN)
    shown.append(
        f"Every argument of Lightning's Trainer is an option too: {trainer}, ...\n"
        "--config FILE reads options from YAML; --print_config shows all options with their values.\n"
        "--data NAME chooses a data module, --data.help NAME shows its options.\n"
    )
    return "\n".join(shown)


def option_names() -> list[str]:
    """Return the names of all options with their dashes, short ones first."""
    return [*SHORT, *train_options()["names"]]


def unknown_option(name: str) -> str:
    """Say that there is no option of a name, which is given without its dashes, and which may have been meant."""
    meant = closest(name, [option.lstrip("-") for option in option_names()])
    return f"unknown option --{name}; " + (f"did you mean --{meant}?" if meant else "see --help")


def check_option(word: str) -> None:
    """Raise UsageError if a word is an option that does not exist.

    Parts of an option that takes a mapping or a class, as ``--data.task``, are for the parser to judge, and so are the
    Trainer's, which are those of the Lightning that is installed.
    """
    name = word.partition("=")[0].removesuffix("+")
    if not re.fullmatch(r"--\w[\w.]*", name) or name.startswith("--trainer"):
        return
    known = train_options()["names"]
    parts = name.split(".")
    wholes = {".".join(parts[:n]) for n in range(1, len(parts))} - {*_GROUPS}
    if name not in known and not wholes & {*known}:
        raise UsageError(unknown_option(name.lstrip("-")))
