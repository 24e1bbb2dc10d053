"""A shell completes commands, options and choices; every option of every command says what it is for."""

from __future__ import annotations

import subprocess
from importlib import import_module

import pytest

from seedlora.cli.argparse_internals import arguments_of
from seedlora.cli.main import COMMANDS, main

PARSED = [name for name in COMMANDS if name not in ("train", "preview")]


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    file = tmp_path_factory.mktemp("completion") / "seedlora.bash"
    with pytest.MonkeyPatch.context() as patch, file.open("w") as out:
        patch.setattr("sys.stdout", out)
        assert main(["completion", "bash"]) == 0
    return file


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("cha", {"chat"}),
        ("merge --into", {"--into_base"}),
        ("generate --top", {"--top_k", "--top_p"}),
        ("serve --server v", {"vllm"}),
        ("train --mer", {"--merge"}),
        ("train --ensemble.se", {"--ensemble.seeds", "--ensemble.select_by"}),
        ("preview --model", {"--model.base_model"}),
    ],
)
def test_bash_completes(script, words, completed):
    typed = ["seedlora", *words.split()]
    lines = [f"source {script}", f"COMP_WORDS=({' '.join(typed)})", f"COMP_CWORD={len(typed) - 1}"]
    lines += ["_shtab_seedlora", 'printf "%s\\n" "${COMPREPLY[@]}"']
    done = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == completed


@pytest.mark.parametrize("name", PARSED)
def test_every_option_says_what_it_is_for(name):
    for argument in arguments_of(import_module(COMMANDS[name].module).make_parser()):
        assert argument.help, f"{name} {argument.option_strings or argument.dest}"


def test_an_unknown_shell(capsys):
    assert main(["completion", "dash"]) == 2
    assert "invalid choice: 'dash' (choose from" in capsys.readouterr().err
