"""Every option of every command, made of the parsers that read them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from importlib import import_module
from inspect import cleandoc, isabstract
from typing import NamedTuple

from seedlora.cli import train_help
from seedlora.cli.argparse_internals import arguments_of
from seedlora.cli.main import COMMANDS
from seedlora.cli.option_words import SHORT
from seedlora.datamodules import all_data_modules
from seedlora.datamodules.table import TableDataModule
from seedlora.run.trainer_options import TRAINER_OPTIONS

_TYPE = re.compile(r"\s*\((?:required, )?type: (?P<type>.*?)(?:, default: (?P<default>.*?))?(?P<more>, known .*)?\)$")
_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`~?(?:[\w.]*\.)?(\w+)`")
_SHORT_NAMES = {long: short for short, long in SHORT.items()}


class Option(NamedTuple):
    """An option as its entry shows it.

    Args:
        names: as they are typed.
        value: what stands for its value; empty where it takes none.
        text: what it does.
        kind: the type of its value, where it is known.
        default: its value if it is not given, where one is known.
    """

    names: tuple[str, ...]
    value: str
    text: str
    kind: str = ""
    default: str = ""

    def entry(self, owner: str = "") -> str:
        """Return its entry in a list, with an anchor of its owner's and its first name."""
        names = ", ".join(f"`{name}{f' {self.value}' if self.value else ''}`" for name in self.names)
        anchor = "_".join([*filter(None, [owner]), *self.names[0].lstrip("-").split(".")])
        facts = ", ".join(
            f"{word} `{value}`" for word, value in (("type", self.kind), ("default", self.default)) if value
        )
        text = " ".join([_markdown(self.text), *([f"*({facts})*"] if facts else [])])
        return f"#### {names} {{ #{anchor} .option }}\n\n{text}"


def train_options() -> str:
    """Return all options of ``train.py`` but those of the Trainer and of the data modules, group by group."""
    found = []
    for group in train_help.train_options()["groups"]:
        found.append(f"### {group['title']}\n")
        found += [_train_option(shown).entry() for shown in group["options"] if "." in shown["names"][0].lstrip("-")]
    return "\n\n".join(found)


def _train_option(shown: train_help.ShownOption) -> Option:
    text = _TYPE.sub("", shown["help"])
    facts = _TYPE.search(shown["help"])
    kind, default = (facts["type"], facts["default"] or "") if facts else ("", "")
    long = shown["names"][0]
    names = tuple(name for name in (long, _SHORT_NAMES.get(long)) if name)
    return Option(names, "", text, kind, default)


def trainer_options() -> str:
    """Return what becomes of each option of Lightning's Trainer, as a table."""
    rows = [f"| `{name}` | {option.how} | {option.says} |" for name, option in TRAINER_OPTIONS.items()]
    return "\n".join(["| option | | what |", "|---|---|---|", *rows])


def data_options() -> str:
    """Return the options of all data modules: those that all have which read files, then what each has of its own."""
    modules = [module for module in all_data_modules() if not isabstract(module)]
    each = {module.__name__: [*_options_of(module)] for module in modules}
    tables = [each[module.__name__] for module in modules if issubclass(module, TableDataModule)]
    shared = [option for option in tables[0] if all(option in options for options in tables)]
    found = ["### All that read files\n", *(option.entry("files") for option in shared)]
    for module in modules:
        own = [option for option in each[module.__name__] if option not in shared]
        found += [f"### {module.__name__}\n", _markdown(cleandoc(module.__doc__ or "").partition("\n\n")[0])]
        found += [option.entry(module.__name__) for option in own]
    return "\n\n".join(found)


def _options_of(module: type) -> Iterator[Option]:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_class_arguments(module, "data")
    return (option for option in _options(parser) if option.names[0].startswith("--data."))


def command_options(name: str) -> str:
    """Return what a command of ``python -m seedlora`` does and takes."""
    parser: argparse.ArgumentParser = import_module(COMMANDS[name].module).make_parser()
    return "\n\n".join([parser.description or "", *(option.entry(name) for option in _options(parser))])


def _options(parser: argparse.ArgumentParser) -> Iterator[Option]:
    for argument in arguments_of(parser):
        if argument.help == argparse.SUPPRESS or "--help" in argument.option_strings:
            continue
        names = tuple(argument.option_strings) or (str(argument.metavar or argument.dest),)
        value = argument.metavar or ("" if argument.nargs == 0 else argument.dest.rpartition(".")[2].upper())
        value = "|".join(map(str, argument.choices)) if argument.choices else str(value)
        default = argument.default
        known = isinstance(default, str | int | float) and default is not False and default != argparse.SUPPRESS
        text = " ".join((argument.help or "").split())
        yield Option(names, value if argument.option_strings else "", text, default=str(default) if known else "")


def _markdown(text: str) -> str:
    """Return a text of a docstring as Markdown: names of roles alone, and one backtick in the place of two."""
    text = _ROLE.sub(r"`\1`", text.replace("%%", "%")).replace("``", "`")
    return re.sub(r"<(?=\w)", r"\<", text)
