"""The test items whose answers a report shows."""

from __future__ import annotations

import json

import pytest

from seedlora.records.samples import read_samples
from seedlora.report.examples import SHOWN, choose_examples, examples_section
from seedlora.report.facts import facts


def sample(item, base, seed, fused, **other):
    right = {"base": base, "seed_1": seed, "fused": fused}
    forced = {label: "7<|end|>" if right[label] else f"{i}<|end|>" for i, label in enumerate(right)}
    return {"item": item, "prompt": "3 + 4 =\n", "expected": "7<|end|>", "right": right, "forced": forced, **other}


def test_items_on_which_adapters_differ_come_first_whoever_is_right():
    alike = [sample(i, True, True, True) for i in range(20)]
    apart = [sample(20, False, True, False), sample(21, True, False, True)]
    found = choose_examples([*alike, sample(30, False, True, True), *apart])
    assert [row["item"] for row in found["shown"]] == [20, 21, 30, *range(SHOWN - 3)]
    assert (found["tested"], found["apart"], found["base_apart"]) == (23, 2, 1)
    section = examples_section(found)
    first = section.examples[0]
    assert (first.prompt, first.expected) == ("3 + 4 =", "7")
    assert [(answer.adapters, answer.text, answer.right) for answer in first.answers] == [
        (["base"], "0", False),
        (["seed_1"], "7", True),
        (["fused"], "2", False),
    ]
    # All the same: one line.
    assert [answer.adapters for answer in section.examples[-1].answers] == [["base", "seed_1", "fused"]]
    assert (
        "differ on 2, the base model alone stands apart on 1, and all are right or all are wrong on 20."
        in (section.lines[0])
    )


def test_long_answers_are_cut_around_their_first_difference():
    expected = "x" * 1000
    forced = {"base": "x" * 500 + "y" + "x" * 499, "fused": expected}
    row = sample(0, False, True, True, prompt="a" * 900 + "?", expected=expected, forced=forced)
    (shown,) = choose_examples([row])["shown"]
    assert len(shown["prompt"]) < 650
    assert shown["prompt"].endswith("a?")
    base, fused = (answer["text"] for answer in shown["answers"])
    assert base == "…" + "x" * 160 + "y" + "x" * 59 + "…"
    assert fused == "…" + "x" * 160


def test_without_samples_there_is_no_such_section(run):
    (run / "samples.jsonl").unlink()
    assert read_samples(run) == []
    assert facts(run)["examples"] is None
    assert examples_section(None).is_empty


@pytest.mark.parametrize("line", ["{", '{"item": 0}', "7"])
def test_a_damaged_file_is_named(run, line):
    (run / "samples.jsonl").write_text(json.dumps(sample(0, True, True, True)) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"samples.jsonl cannot be read: "):
        read_samples(run)
