"""The preview: facts against a count by hand, and what a user reads."""

from __future__ import annotations

import json

import pytest

from seedlora.datamodules.preview import main
from seedlora.model.loading import load_tokenizer


@pytest.fixture
def run(tiny_llama, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    rows = [{"prompt": "a" * n, "response": "\u00e9"} for n in range(1, 11)]
    lines = [*map(json.dumps, rows), '{"prompt": 1}', json.dumps({"prompt": "a" * 99, "response": "b"})]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    fixed = ["--data", "InstructionData", "--data.path", "rows.jsonl", "--data.style", "plain"]

    def run(*options):
        code = main([*fixed, *options], load_tokenizer=load_tokenizer, default_model=tiny_llama)
        return code, capsys.readouterr()

    return run


SPLITS = [
    "--data.val_fraction",
    "0",
    "--data.test_fraction",
    "0",
    "--data.on_bad_row",
    "skip",
    "--data.max_length",
    "50",
]


def test_the_facts_are_those_counted_by_hand(run):
    code, printed = run(*SPLITS, "--json", "--rows", "1")
    assert code == 0
    facts = json.loads(printed.out)
    assert facts["splits"] == {"train": 10, "val": 0, "test": 0}
    counts = {"read": 12, "bad": 1, "long": 0, "unsupervised": 1, "cut": 0}
    assert counts.items() <= facts["counts"][""].items()
    assert facts["rows"] == [[["a\n", False], ["\u00e9", True], ["<eos>", True]]]
    # a prompt of n, a newline, two bytes, and the end token
    assert facts["tokens"] == sum(n + 4 for n in range(1, 11))
    assert facts["supervised"] == 30
    assert facts["lengths"] == [5, 9, 13, 14]
    assert sum(rows for _, _, rows in facts["histogram"]) == 10


def test_the_preview_shows_rows_splits_and_bad_rows(run):
    code, printed = run(*SPLITS)
    assert code == 0
    for text in (
        "training row 3",
        "\u00e9<eos>",
        "10 train",
        "1 unreadable (first: rows.jsonl, line 11: column 'prompt'",
        "█",
    ):
        assert text in printed.out
    assert "1 without a response within max_length left out" in " ".join(printed.out.replace("│", " ").split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "rows.jsonl, line 11: column 'prompt' holds a int"),
        (["--data.pth", "x"], "unknown option --data.pth"),
        (["--data", "Nope"], "unknown data module 'Nope'; choose one of CodeFeedback, "),
        (["--data.style", "fancy"], "error: Unknown prompt style 'fancy'"),
        (["--data.path", "nowhere.jsonl"], "error: data.path 'nowhere.jsonl' is no file or folder"),
    ],
)
def test_bad_requests_are_one_sentence(run, options, message):
    code, printed = run(*options)
    assert code == 2
    assert len(printed.err.strip().splitlines()) == 1
    assert message in printed.err
    assert "<class" not in printed.err
