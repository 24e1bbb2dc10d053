"""What is used of argparse beyond its documentation is still there: one test for each use, named after it."""

from __future__ import annotations

from lightning.pytorch.cli import LightningArgumentParser

from seedlora.cli.argparse_internals import arguments_of


class TestArgparse:
    def parser(self, kind=LightningArgumentParser):
        parser = kind()
        parser.add_argument("--one", type=int)
        parser.add_argument_group("Some").add_argument("--two", type=int, help="the second")
        return parser

    def test_arguments_of(self):
        assert [argument.dest for argument in arguments_of(self.parser())][-2:] == ["one", "two"]
