"""Whatever comes out of a command ends in one line, and its output can be pasted."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from seedlora.cli import inspect, merge
from seedlora.cli import train as training
from seedlora.cli.main import main
from seedlora.utils.places import without_home
from tests.helpers.adapter_folders import save_adapter


class OddError(Exception):
    """An error that nobody has thought of."""


def raise_odd(*_: object, **__: object) -> None:
    raise OddError("odd\n  thing")


def check_line_and_log(code: int, said: str) -> None:
    """One line that names the error, and a file that has all of it."""
    assert code == 1
    assert said.count("\n") == 1
    assert said.startswith("error: OddError: odd thing (not foreseen; the full log")
    log = Path(re.search(r"is (\S+\.log)\)", said)[1])
    text = log.read_text()
    log.unlink()
    assert "in raise_odd" in text
    assert "seedlora" in text


def test_an_error_that_is_not_foreseen_is_one_line(good, monkeypatch, capsys):
    monkeypatch.setattr(inspect, "serving_problems", raise_odd)
    code = main(["inspect", str(good)])
    check_line_and_log(code, capsys.readouterr().err)


def test_so_is_one_of_train_py(monkeypatch, capsys):
    monkeypatch.setattr(training, "read_words", raise_odd)
    check_line_and_log(training.main(["--plan"]), capsys.readouterr().err)


def test_an_interrupt_is_one_word(good, monkeypatch, capsys):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect, "serving_problems", interrupt)
    assert main(["inspect", str(good)]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_the_home_folder_is_found_wherever_a_path_is_given(good, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for words in (["--out", "~/a"], ["--out=~/b"]):
        assert main(["merge", str(good), "--method", "soup", *words]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
    assert main(["inspect", "~/a"]) == 0


def test_without_a_home_folder_it_is_said(good, tmp_path, monkeypatch, capsys):
    def no_home(*_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    monkeypatch.setattr(Path, "home", no_home)
    assert main(["merge", str(good), "--method", "soup", "--out", "~/a"]) == 2
    assert "no home folder is known that ~ could stand for; write the whole path" in capsys.readouterr().err
    monkeypatch.delenv("SEEDLORA_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert main(["evaluate", "--base-model", "embedded", "--task", "gsm8k"]) == 2
    assert "no home folder is known" in capsys.readouterr().err
    assert without_home("/x") == "/x"


@pytest.mark.parametrize("name", ["lora[r=8]", "x[/b]", "a b", "it's", ":smile:"])
def test_names_are_printed_as_they_are(name, tmp_path, capsys):
    """Brackets are no markup, and what is to be pasted is quoted."""
    folder = tmp_path / name
    save_adapter(folder / "1", r=2, lora_alpha=6, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM")
    assert main(["inspect", str(folder / "1")]) == 0
    assert f"{folder / '1'}: " in capsys.readouterr().out
    assert main(["compare", str(folder / "1")]) == 0
    capsys.readouterr()
    assert (
        main(["merge", str(folder / "1"), "--method", "soup", "--base", "owner/my base", "--out", str(folder / "o")])
        == 0
    )
    shown = capsys.readouterr().out
    assert f"into {folder / 'o'}" in shown
    command = re.search(r"vllm serve (.*\\\n)*.*", shown)[0].replace("\\\n", " ")
    words = shlex.split(command)
    served = words[words.index("--lora-modules") + 1]
    assert served in (f"o={folder / 'o'}", f'{{"name": "o", "path": "{folder / "o"}"}}')


@pytest.mark.parametrize("named", [None, "", "owner/base"])
def test_no_printed_command_has_an_empty_name(named, broken, tmp_path, capsys):
    folder = broken(config={"base_model_name_or_path": named, "task_type": "CAUSAL_LM"})
    assert main(["merge", str(folder), "--method", "soup", "--out", str(tmp_path / "o")]) == 0
    shown = capsys.readouterr().out
    command = re.search(r"vllm serve .*", shown)[0]
    assert shlex.split(command.rstrip("\\"))[2] == (named or "BASE_MODEL")
    assert ("write it in the place of BASE_MODEL" in shown) == (not named)
    card = (tmp_path / "o" / "README.md").read_text()
    assert ("base_model: owner/base" in card) == bool(named)
    assert not re.search(r"base_model:\s*\n", card)
    assert main(["inspect", str(folder)]) == 0
    assert ("names no base model" in capsys.readouterr().out) == (not named)


def test_output_in_any_encoding(good, tmp_path):
    """Of a terminal, or a file, that takes ASCII alone."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(merge.__file__).parents[2])}
    words = [sys.executable, "-m", "seedlora", "inspect", str(good)]
    done = subprocess.run(words, env=environment, capture_output=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert b"q_proj" in done.stdout
