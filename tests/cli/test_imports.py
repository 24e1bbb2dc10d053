"""A command imports what it needs, each in a process of its own: what is on a list here costs seconds, or half ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

#: Needed by training alone, by scores of a test, or by a figure.
TRAINING = [
    "peft",
    "transformers",
    "lightning",
    "torchmetrics",
    "bitsandbytes",
    "matplotlib",
    "scipy.stats",
    "datasets",
]
#: Rooms of the package that bring such libraries, or are for other commands.
ROOMS = ["seedlora.training", "seedlora.callbacks", "seedlora.report", "seedlora.evaluation"]
ALL = ["torch", "numpy", "safetensors", "jsonargparse", *TRAINING, *ROOMS]
#: What runs the commands one after the other, and tells which of the modules on its list each brought.
PROGRAM = """
import contextlib, io, json, sys
commands, unwanted, out = json.loads(sys.argv[1]), json.loads(sys.argv[2]), {}
for words in commands:
    kind, *words = words
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            if kind == "train.py":
                from seedlora.cli.train import main
            else:
                from seedlora.cli.main import main
            code = main(words)
        except SystemExit as left:
            code = left.code
    out[" ".join([kind, *words])] = [code or 0, sorted(name for name in unwanted if name in sys.modules)]
print(json.dumps(out))
"""


def imported(commands: list[list[str]], unwanted: list[str]) -> dict[str, list[object]]:
    """The exit code of each command, and which of the modules it has imported that it should not."""
    program = [sys.executable, "-c", PROGRAM, json.dumps(commands), json.dumps(unwanted)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["seedlora", "--help"], 0),
        (["seedlora", "--version"], 0),
        (["seedlora", "fuse"], 2),
        (["seedlora", "methods"], 0),
        (["seedlora", "methods", "--json"], 0),
        (["seedlora", "doctor", "--help"], 0),
        (["seedlora", "train", "--help"], 0),
        (["train.py", "--help"], 0),
        (["train.py", "--merge", "sedlora"], 2),
        (["train.py", "--merge=soup", "--compare", "soup,tie"], 2),
        (["train.py", "--modle.r", "3"], 2),
        (["train.py", "--config", "broken.yaml"], 2),
        (["train.py", "test"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_without_torch(words, code, tmp_path):
    (tmp_path / "broken.yaml").write_text("model: {r: 8")
    assert imported([words], ALL) == {" ".join(words): [code, []]}


@pytest.mark.parametrize("name", ["inspect", "merge"])
def test_adapters_are_read_and_written_without_peft(name, plain_folders):
    words = {"inspect": plain_folders[:1], "merge": [*plain_folders, "--out", "fused"]}[name]
    command = ["seedlora", name, *words]
    assert imported([command], [*TRAINING, *ROOMS]) == {" ".join(command): [0, []]}


def test_comparing_adapters_draws_nothing(plain_folders):
    command = ["seedlora", "compare", *plain_folders]
    assert imported([command], TRAINING) == {" ".join(command): [0, []]}


def test_help_of_a_command_needs_none_of_its_libraries():
    names = ["inspect", "merge", "compare", "push", "export", "serve", "report", "evaluate", "chat", "generate"]
    commands = [["seedlora", name, "--help"] for name in names] + [["seedlora", "completion", "bash"]]
    assert imported(commands, TRAINING) == {" ".join(words): [0, []] for words in commands}
