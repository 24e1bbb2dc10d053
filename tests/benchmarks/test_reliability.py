"""Mutated inputs end well or in our own sentence; the whole counts are a benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.reliability import adapters, counts, parts, rows

FOLDER = Path(parts.__file__).parent


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return rows.make_world(tmp_path_factory.mktemp("rows") / "world")


def test_mutated_files_give_rows_or_a_sentence_that_names_the_file(tokenizer, tmp_path):
    found = [rows.tried(seed, tokenizer, tmp_path / "case") for seed in range(12)]
    assert [outcome.wrong for outcome in found if outcome.wrong] == []
    assert any("rows" in text.split() for outcome in found for text in outcome.said)


def test_a_seed_gives_the_same_file_each_time():
    assert [rows.mutated_file(seed) for seed in (1, 2)] == [rows.mutated_file(seed) for seed in (1, 2)]
    assert len({rows.mutated_file(seed) for seed in range(20)}) == 20


def test_counts_go_on_where_they_were(tmp_path):
    def tried(seed):
        return counts.Outcome(
            seed, "case", ("done",), 0.5, "wrong" if seed == 3 else "", ("even" if seed % 2 == 0 else "odd",)
        )

    counts.count(tried, 2, tmp_path / "x.json", command="first")
    again = counts.count(tried, 6, tmp_path / "x.json", command="second")
    assert [outcome.seed for outcome in again] == [2, 3, 4, 5]
    stored = json.loads((tmp_path / "x.json").read_text())
    assert (stored["done"], stored["kinds"], stored["command"]) == (6, {"even": 3, "odd": 3}, "second")
    assert [outcome["seed"] for outcome in stored["wrong"]] == [3]


def test_what_is_kept_says_how_many_and_by_which_command():
    files = {file.stem: json.loads(file.read_text()) for file in FOLDER.glob("*.json")}
    assert files
    for part, stored in files.items():
        assert stored["command"].startswith(f"python -m benchmarks.reliability {part} ")
        assert stored["done"] <= parts.PARTS[part].count


@pytest.mark.slow
def test_mutated_adapters_are_merged_as_peft_does_or_refused(tmp_path):
    world = adapters.make_world(tmp_path / "world")
    found = [adapters.tried(seed, world, tmp_path / "case") for seed in range(40)]
    assert [(outcome.seed, outcome.case, outcome.wrong) for outcome in found if outcome.wrong] == []
    assert any("compared with PEFT" in outcome.kinds for outcome in found)
