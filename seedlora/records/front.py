"""In ``report.json``: what the first screen of a report says, and the test items whose answers it shows."""

from __future__ import annotations

from typing import TypedDict

from seedlora.records.results import ScoreRecord


class Command(TypedDict):
    """Hold a command that can be copied.

    Attributes:
        what: what it does.
        line: the command.
    """

    what: str
    line: str


class Front(TypedDict):
    """Answer what a reader asks first.

    Attributes:
        model: name of the base model.
        data: name of what was trained on.
        started: day on which the run was started, as `2026-11-30`; null where that is not stored.
        state: how far the run is; null for one that is finished.
        adapter: label of what to use; null before the end.
        path: its folder, from where the run was started; null for the base model.
        commands: what can be done with it.
        before: score of the base model on the first test set; null without a test.
        after: score of what to use on that test set; null without a test.
        helped: whether training helped, in a sentence.
        sure: what to use and how sure that is, in a sentence.
        compared: fused adapter against seeds and soup, in a sentence.
        tokens: tokens that all seeds were trained on; null where that is not known.
        seconds: how long the whole run took; null where that is not known.
        peak_gib: most memory of training, in GiB; null where that was not measured.
    """

    model: str | None
    data: str
    started: str | None
    state: str | None
    adapter: str | None
    path: str | None
    commands: list[Command]
    before: ScoreRecord | None
    after: ScoreRecord | None
    helped: str
    sure: str
    compared: str
    tokens: float | None
    seconds: float | None
    peak_gib: float | None


class ExampleAnswer(TypedDict):
    """Hold the answer of one adapter.

    Attributes:
        adapter: label of the adapter.
        text: its answer, up to its first wrong token and a little further.
        right: whether it is the expected one.
    """

    adapter: str
    text: str
    right: bool


class ExampleItem(TypedDict):
    """Hold a test item with the answers to it.

    Attributes:
        item: number of the test item.
        prompt: what was asked; the middle of a long one is left out.
        expected: the expected answer; a long one is cut.
        answers: what each adapter says.
    """

    item: int
    prompt: str
    expected: str
    answers: list[ExampleAnswer]


class Examples(TypedDict):
    """Hold some of the test items: first those whose answers differ.

    Attributes:
        tested: number of items that were tested.
        apart: number of items which some of seeds, soup and fused adapter get right and others do not.
        base_apart: number of further items on which the base model stands apart from all of them.
        shown: the items that are shown.
    """

    tested: int
    apart: int
    base_apart: int
    shown: list[ExampleItem]
