"""What is used of argparse beyond its documentation is still there: one test for each use, named after it."""

from __future__ import annotations

import pytest
from lightning.pytorch.cli import LightningArgumentParser

from seedlora.cli.argparse_internals import arguments_of, option_groups, option_names


class TestArgparse:
    def parser(self, kind=LightningArgumentParser):
        parser = kind()
        parser.add_argument("--one", type=int)
        parser.add_argument_group("Some").add_argument("--two", type=int, help="the second")
        return parser

    def test_arguments_of(self):
        assert [argument.dest for argument in arguments_of(self.parser())][-2:] == ["one", "two"]

    def test_option_names(self):
        assert {"--help", "--one", "--two"} <= set(option_names(self.parser()))

    def test_option_groups(self):
        groups = {}

        class Parser(LightningArgumentParser):
            def format_help(self):
                groups.update({title: (names, text) for title, names, text in option_groups(self)})
                return ""

        with pytest.raises(SystemExit):
            self.parser(Parser).parse_args(["--help"])
        names, text = groups["Some"]
        assert names == ["--two"]
        assert text.startswith("Some:\n")
        assert "the second" in text
