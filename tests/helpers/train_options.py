"""Write ``train_options.json`` again when options of train.py change: ``python -m tests.helpers.train_options``."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from jsonargparse import DefaultHelpFormatter

from seedlora.cli.argparse_internals import arguments_of
from seedlora.cli.parser import SeedLoRACLI
from seedlora.cli.train_help import OptionGroup, TrainOptions

FILE = files("seedlora.cli") / "train_options.json"


def recorded_options() -> TrainOptions:
    """What the parser of train.py would show, as it says it itself to its formatter."""
    groups: list[OptionGroup] = []

    class Recorder(DefaultHelpFormatter):
        def start_section(self, heading):
            groups.append({"title": heading, "options": []})
            super().start_section(heading)

        def add_argument(self, action):
            if action.option_strings and groups:
                shown = self._format_action_invocation(action).split(", ")[0]
                value = shown.removeprefix(action.option_strings[0]).strip()
                help_text = " ".join(self._expand_help(action).split())
                option = {"names": list(action.option_strings), "value": value or None, "help": help_text}
                groups[-1]["options"].append(option)
            super().add_argument(action)

    parser = SeedLoRACLI([]).parser
    parser.formatter_class = Recorder
    super(type(parser), parser).format_help()
    ours = [group for group in groups if group["options"] and group["title"] != "options"]
    return {
        "groups": [group for group in ours if not group["options"][0]["names"][0].startswith("--trainer")],
        "names": [name for argument in arguments_of(parser) for name in argument.option_strings],
    }


def text_of(options: TrainOptions) -> str:
    return json.dumps(options, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    Path(str(FILE)).write_text(text_of(recorded_options()), encoding="utf-8")
