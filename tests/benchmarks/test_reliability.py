"""Mutated row files end in rows or in our own sentence; the whole count is a benchmark."""

from __future__ import annotations

import pytest

from benchmarks import reliability_rows
from tests.helpers.models import make_module


@pytest.fixture
def tokenizer(tiny_llama):
    tokenizer = make_module(tiny_llama).tokenizer
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    return tokenizer


def test_mutated_files_give_rows_or_a_sentence_that_names_the_file(tokenizer, monkeypatch):
    monkeypatch.setenv("SEEDLORA_CACHE", "")  # put back afterwards
    found = reliability_rows.run(12, tokenizer)
    assert [outcome.wrong for outcome in found if outcome.wrong] == []
    assert any("rows" in text.split() for outcome in found for text in outcome.said)


def test_a_seed_gives_the_same_file_each_time():
    assert [reliability_rows.mutated_file(seed) for seed in (1, 2)] == [
        reliability_rows.mutated_file(seed) for seed in (1, 2)
    ]
    assert len({reliability_rows.mutated_file(seed) for seed in range(20)}) == 20
