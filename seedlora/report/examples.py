"""Choose test items whose answers are shown: first those on which the adapters differ."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from seedlora.names import BASE
from seedlora.records.front import ExampleItem, Examples
from seedlora.records.samples import Sample
from seedlora.report.parts import Answer, Example, Section, count_text

#: Items that are shown.
SHOWN = 12
#: Letters of a prompt, and of an answer before and after its first difference.
_PROMPT, _BEFORE, _AFTER = 600, 160, 60
#: Characters that no page can show.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
#: A token that ends an answer, as text.
_END = re.compile(r"(?:<\|[\w ]+\|>|</?\w+>)\s*$")


def choose_examples(samples: Sequence[Sample]) -> Examples | None:
    """Choose a dozen test items; None without any.

    First come those which some of seeds, soup and fused adapter get right and others do not, then those on which the
    base model stands apart from all of these, then the others, each in the order of the test: who is right is not
    looked at.
    """
    if not samples:
        return None
    kinds = [_kind(sample["right"]) for sample in samples]
    order = sorted(range(len(samples)), key=kinds.__getitem__)[:SHOWN]
    return {
        "tested": len(samples),
        "apart": kinds.count(0),
        "base_apart": kinds.count(1),
        "shown": [_example(samples[i]) for i in order],
    }


def _kind(right: Mapping[str, bool]) -> int:
    """Return 0 where the adapters differ, 1 where the base model differs from all of them, 2 where nobody does."""
    adapters = {outcome for label, outcome in right.items() if label != BASE}
    if len(adapters) > 1:
        return 0
    return 1 if len(set(right.values())) > 1 else 2


def _example(sample: Sample) -> ExampleItem:
    ended = _END.search(sample["expected"])
    end = ended[0] if ended else ""
    expected = sample["expected"].removesuffix(end)
    prompt = sample["prompt"].strip()
    if len(prompt) > _PROMPT:
        prompt = f"{prompt[: _PROMPT // 3]} … {prompt[-2 * _PROMPT // 3 :]}"
    return {
        "item": sample["item"],
        "prompt": prompt,
        "expected": expected if len(expected) <= _PROMPT else f"{expected[:_PROMPT]}…",
        "answers": [
            {
                "adapter": label,
                # An end token among the others ends what the adapter says by itself.
                "text": _around_difference(text.partition(end)[0] if end else text, expected),
                "right": sample["right"][label],
            }
            for label, text in sample["forced"].items()
        ],
    }


def _around_difference(text: str, expected: str) -> str:
    """Return the part of an answer around its first difference from the expected one.

    >>> _around_difference("x" * 400 + "b" * 90, "x" * 500) == "…" + "x" * 160 + "b" * 60 + "…"
    True
    """
    shorter = min(len(text), len(expected))
    place = next((i for i in range(shorter) if text[i] != expected[i]), shorter)
    start, stop = max(0, place - _BEFORE), place + _AFTER
    return f"{'…' if start else ''}{text[start:stop]}{'…' if stop < len(text) else ''}"


def examples_section(examples: Examples | None) -> Section:
    """Show the items; adapters that say the same stand together."""
    if examples is None:
        return Section("")
    alike = examples["tested"] - examples["apart"] - examples["base_apart"]
    line = (
        f"Of {count_text(examples['tested'])} test items the adapters differ on {count_text(examples['apart'])}, the "
        f"base model alone stands apart on {count_text(examples['base_apart'])}, and all are right or all are wrong on "
        f"{count_text(alike)}."
    )
    note = (
        f"These are the first {len(examples['shown'])} items in that order; who is right was not looked at when they "
        "were chosen. An answer that is right is what the adapter says by itself. One that is wrong is its own up to "
        "the first wrong token; from there on each token is the most likely one after the expected answer so far."
    )
    return Section(
        "Answers to test items",
        [line],
        notes=[note],
        unfolded=True,
        examples=[
            Example(str(row["item"]), row["prompt"], row["expected"], _grouped(row)) for row in examples["shown"]
        ],
    )


def _grouped(row: ExampleItem) -> list[Answer]:
    """Put adapters with the same answer together, in their order."""
    groups: dict[tuple[str, bool], list[str]] = {}
    for answer in row["answers"]:
        groups.setdefault((answer["text"], answer["right"]), []).append(answer["adapter"])
    return [Answer(labels, _visible(text), right) for (text, right), labels in groups.items()]


def _visible(text: str) -> str:
    """Write an answer so that an empty one and line breaks before it are seen."""
    stripped = text.lstrip("\n")
    return "↵" * (len(text) - len(stripped)) + _CONTROLS.sub("\ufffd", stripped) if text else "(nothing)"
