"""The commands of ``python -m seedlora``, and one sentence for what cannot be done."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from seedlora.cli.main import main
from seedlora.merge.registry import METHODS

BAD = [
    (["merge", "A", "--out", "O", "--method", "tie"], "Unknown merge method 'tie'"),
    (["merge", "A", "--out", "O", "--method", "ties", "--density", "2"], r"density must be a number in (0, 1], got 2"),
    (["merge", "A", "--out", "O", "--method", "soup", "--density", "0.2"], "has no option 'density'"),
    (
        ["merge", "A", "--out", "O", "--method", "greedy_soup"],
        "greedy_soup chooses among adapters by a score",
    ),
    (["merge", "A", "--out", "O", "--method", "soup", "--weights", '{"a":1}'], "Merge method 'soup': "),
    (["merge", "A", "--out", "O", "--method", "ties", "--scale", "NaN"], "its result is not finite with scale=nan"),
    (["merge", "A", "A", "--out", "O"], "was given twice"),
    (["merge", "A/nowhere/at/all", "--out", "O"], "is no folder"),
    (["merge", "A", "--out", "O", "--dtype", "int4"], "argument --dtype: invalid choice"),
    (["merge", "A", "--out", "O", "--into_base", "A"], "holds no model.safetensors"),
    (["merge", "A", "--out", "O", "--into_base", "nowhere"], "is no folder"),
    (["merge", "A", "--out", "A/adapter_config.json/x"], "adapter_config.json is no folder that may be written to"),
    (["merge", "A"], "the following arguments are required: --out"),
    (["inspect", "nowhere"], "is no folder"),
    (["merge", "A", "--rnak", "3", "--out", "O"], "unknown option --rnak; did you mean --rank? (see python -m"),
    (["chat", "nowhere"], "nowhere is no folder; give a run's folder, an adapter's folder or a hub id (owner/name, "),
    (["merge", "A", "--out"], "error: --out needs a value (see python -m seedlora merge --help)"),
    (["compare", "A", "--method", "nothing"], "Unknown merge method"),
    ([], "a command is missing; choose one of train, preview, merge"),
    (["fuse"], "unknown command 'fuse'; choose one of train, preview, merge"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_bad_input_is_one_sentence(words, message, plain_folders, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [word.replace("A", plain_folders[0], 1) if word.startswith("A") else word for word in words]
    assert main(words) == 2
    found = capsys.readouterr()
    assert message in found.err
    assert found.err.startswith("error: ")
    assert found.err.count("\n") == 1
    assert found.out == ""
    assert not (tmp_path / "O").exists()


def test_the_commands_run_as_a_module(plain_folders, tmp_path):
    run = [sys.executable, "-m", "seedlora", "inspect"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*run, plain_folders[0]], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0
    assert "gate_proj" in done.stdout
    done = subprocess.run([*run, str(tmp_path)], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


def test_every_method_is_listed(capsys):
    assert main(["methods", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["methods"]) == set(METHODS)
    assert found["methods"]["ties"]["options"] == {"density": 0.2, "scale": 1.0, "scope": "layer"}
    assert main(["methods"]) == 0
    assert "Yadav" in capsys.readouterr().out
