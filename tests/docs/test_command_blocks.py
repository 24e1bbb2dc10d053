"""Every command that README and docs show is read by the parser that a user meets, and run where it can run here."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from seedlora.cli.command_parser import CommandParser
from seedlora.cli.errors import UsageError
from seedlora.cli.main import COMMANDS
from seedlora.cli.parser import DEFAULT_DATA, SeedLoRACLI
from seedlora.cli.train_words import read_words
from tests.helpers.command_blocks import OTHERS, PAGES, Shown, adapted, lay_out, shown_commands
from tests.helpers.commands import train
from tests.helpers.paths import ROOT

SHOWN = shown_commands()


@pytest.fixture(scope="module")
def train_parser():
    return SeedLoRACLI([]).parser


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder that has the files of options that pages name."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for run in ("RUN", "runs/x"):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "config.yaml").write_text("{}")
    monkeypatch.chdir(tmp_path)


def test_pages_show_commands():
    assert len(SHOWN) > 80
    assert {shown.page for shown in SHOWN} >= {
        "README.md",
        "docs/tutorial.md",
        "docs/serving.md",
        "benchmarks/README.md",
    }
    assert {shown.kind for shown in SHOWN} >= {*COMMANDS}


@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in PAGES])
def test_every_command_has_words_that_its_parser_takes(page, here, train_parser):
    refused = {}
    for shown in (shown for shown in SHOWN if shown.page == page):
        try:
            read(shown, train_parser)
        except (ValueError, UsageError) as error:
            refused[shown.line] = str(error)
        except SystemExit as asked_for_help:
            refused |= {shown.line: "exit"} if asked_for_help.code else {}
    assert refused == {}


def read(shown: Shown, train_parser) -> None:
    if shown.kind == "train":
        words = [word for word in shown.options if word not in ("--help", "--print_config")]
        train_parser.parse_args(["--data", DEFAULT_DATA, *read_words(words)])
    elif shown.kind in COMMANDS:
        parser = import_module(COMMANDS[shown.kind].module).make_parser()
        (parser.parse if isinstance(parser, CommandParser) else parser.parse_args)(shown.options)
    elif shown.kind.endswith(".py"):
        source = (ROOT / shown.kind).read_text(encoding="utf-8")
        for option in (word for word in shown.options if word.startswith("--") and shown.kind != "tests/check.py"):
            assert f'"{option}"' in source, f"{shown.kind} has no {option}"
    else:
        assert shown.words[0].startswith(OTHERS), f"nobody knows {shown.line}"


@pytest.mark.parametrize("words", [["--model.rnak", "8"], ["--model.r", "many"], ["--merge", "soop"]])
def test_a_wrong_option_fails(words, here, train_parser):
    with pytest.raises((ValueError, UsageError)):
        read(Shown("page", ("python", "train.py", *words)), train_parser)


def test_a_wrong_option_of_a_command_fails(here, train_parser):
    with pytest.raises(ValueError, match="unknown option --methd; did you mean --method"):
        read(Shown("page", ("python", "-m", "seedlora", "merge", "A", "--methd", "soup", "--out", "o")), train_parser)


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")])
def test_python_blocks_are_python(page: Path):
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S):
        compile(block, str(page), "exec")


@pytest.fixture(scope="module")
def finished_run(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert (
        train(tiny_llama, "--model.dtype", "float32", "--trainer.max_epochs", "3", "--ensemble.dirpath", str(folder))
        == 0
    )
    return folder


@pytest.fixture
def workplace(finished_run, tiny_llama, tmp_path, monkeypatch):
    """A folder as the pages have it: rows, adapters A, B and C, and finished runs."""
    lay_out(tmp_path, tiny_llama, [str(finished_run / f"seed_{seed}") for seed in (11, 42, 202)], finished_run)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("kind", ["methods", "inspect", "compare", "merge"])
def test_what_is_quick_runs(kind, plain_folders, plain_base, tmp_path, monkeypatch, capsys):
    lay_out(tmp_path, str(plain_base), plain_folders)
    monkeypatch.chdir(tmp_path)
    quick = [
        shown for shown in SHOWN if shown.kind == kind and shown.why_not_run is None and "--plot" not in shown.words
    ]
    assert quick
    for shown in quick:
        assert run(shown, str(plain_base)) == 0, f"{shown.page}: {shown.line}: {capsys.readouterr().err}"


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({shown.page for shown in SHOWN}))
def test_the_commands_of_a_page_run(page, workplace, tiny_llama, capsys, monkeypatch):
    """In their order, with training made small; a chat hears one request."""
    for shown in (shown for shown in SHOWN if shown.page == page and shown.why_not_run is None):
        if shown.kind in COMMANDS:
            monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
            assert run(shown, tiny_llama) == 0, f"{page}: {shown.line}: {capsys.readouterr().err}"


def run(shown: Shown, base_model: str) -> int:
    main = import_module(COMMANDS[shown.kind].module).main
    try:
        return main(adapted(shown, base_model))
    except SystemExit as error:
        return int(error.code or 0)


def test_the_rows_of_the_tutorial_are_those_that_it_shows():
    script = [sys.executable, str(ROOT / "examples" / "date_rows.py")]
    printed = subprocess.run(script, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(printed) == 240
    assert "\n".join(printed[:3]) in (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")


def python_block(page: str) -> str:
    (block,) = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(encoding="utf-8"), flags=re.M | re.S
    )
    return block


def test_a_merge_from_python_runs(plain_folders, plain_base, tmp_path, monkeypatch):
    lay_out(tmp_path, str(plain_base), plain_folders)
    monkeypatch.chdir(tmp_path)
    exec(python_block("merging.md"), {})
    assert (tmp_path / "fused" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_training_from_python_runs(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    block = python_block("python.md").replace("HuggingFaceTB/SmolLM2-135M", tiny_llama)
    exec(block.replace("ReasoningGym()", "ReasoningGym(num_train=48, num_val=8, num_test=8)"), {})
    assert (tmp_path / "runs" / "x" / "report.html").is_file()
