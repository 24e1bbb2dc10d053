"""The preview: facts against a count by hand, and what a user reads."""

from __future__ import annotations

import json

import pytest

from seedlora.datamodules import InstructionData
from seedlora.datamodules.preview import main, preview
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
        "«\u00e9<eos>»",
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
        (["--data.path", "nowhere.jsonl"], "error: path 'nowhere.jsonl' is no file or folder"),
    ],
)
def test_bad_requests_are_one_sentence(run, options, message):
    code, printed = run(*options)
    assert code == 2
    assert len(printed.err.strip().splitlines()) == 1
    assert message in printed.err
    assert "<class" not in printed.err


def test_much_padding_names_the_option_that_helps_with_what_it_leaves(run, tmp_path):
    rows = [{"prompt": "a" * (1 if i % 8 else 180), "response": "b"} for i in range(64)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, printed = run("--json", "--data.max_length", "256", "--data.val_fraction", "0", "--data.test_fraction", "0")
    facts = json.loads(printed.out)
    (sentence,) = facts["advice"]
    assert facts["padding"] > 0.5
    assert sentence.startswith(f"{facts['padding']:.0%} of a forward is padding; pack_tokens=366 would leave ")
    _, printed = run("--json", "--data.max_length", "256", "--data.pack_tokens", "366")
    assert json.loads(printed.out)["advice"] == []


def test_the_prompt_that_a_server_must_use_is_said(run):
    _, printed = run(*SPLITS)
    assert "style plain: a server asks in it by the chat template" in " ".join(printed.out.split())


def test_rows_longer_than_the_base_has_positions_are_refused(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("SEEDLORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "own.jsonl").write_text(json.dumps({"prompt": "a" * 20, "response": "b"}))
    data = InstructionData(str(tmp_path / "own.jsonl"), style="plain")
    data.tokenizer = tokenizer
    data.setup()
    data.check_positions(23)
    data.check_positions(None)
    with pytest.raises(ValueError, match=r"a row has 23 tokens, the base model only 22 positions; give"):
        data.check_positions(22)
    facts = preview(data, problems=lambda rows: [f"its longest row has {rows.rows['train'].lengths.max()} tokens"])
    assert facts.advice[-1] == "its longest row has 23 tokens"
