"""Show the first screen of a page: what to use, how sure that is, what to do next, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from seedlora.names import BASE, FUSED, SOUP
from seedlora.records.cost import replica_count
from seedlora.records.front import Command
from seedlora.records.report import ComparisonReport, Report
from seedlora.report.parts import Drawings, Picture, amount_text, count_text, duration_text, percent_text
from seedlora.scores.intervals import CONFIDENCE_PERCENT
from seedlora.scores.train_or_fuse import FUSE, TRAIN_LONGER


class Said(NamedTuple):
    """Hold a short answer to a question, with a sentence about it."""

    question: str
    answer: str
    sentence: str = ""


@dataclass(frozen=True)
class FrontView:
    """Hold what the first screen shows, as it is written.

    Args:
        title: of the page.
        about: what kind of run it is, in a line.
        use: label of what to use.
        path: its folder.
        before: score of the base model in percent.
        after: score of what to use in percent.
        items: number of test items.
        lines: what is said first.
        answers: short answers to further questions.
        cost: what the run took, in a few amounts.
        commands: what can be done with the adapter.
        pictures: one figure.
    """

    title: str
    about: str = ""
    use: str | None = None
    path: str | None = None
    before: str | None = None
    after: str | None = None
    items: str = ""
    lines: Sequence[str] = ()
    answers: Sequence[Said] = ()
    cost: Sequence[str] = ()
    commands: Sequence[Command] = ()
    pictures: Sequence[Picture] = ()


def front_of_run(report: Report, drawings: Drawings) -> FrontView:
    """Return the first screen of a run's report."""
    front = report["front"]
    scored = front["before"] is not None and front["after"] is not None and front["adapter"] != BASE
    answers = []
    if front["sure"]:
        advice, _, why = front["sure"].partition(": ")
        sentence = " ".join([f"{why[:1].upper()}{why[1:]}", *report["advice"]["sentences"]]) if why else advice
        answers.append(Said("How sure is that?", "", sentence))
    if report["train_or_fuse"] is not None:
        answers.append(_train_or_fuse(report["train_or_fuse"]["verdict"], report["train_or_fuse"]["sentences"]))
    return FrontView(
        title=report["title"],
        about=_about(report),
        use=front["adapter"],
        path=front["path"],
        before=percent_text(front["before"]["value"]) if scored and front["before"] else None,
        after=percent_text(front["after"]["value"]) if scored and front["after"] else None,
        items=count_text(front["after"]["n"]) if front["after"] else "",
        # Beside the scores of a test it stands in their own part.
        lines=[
            sentence
            for sentence in (front["state"], front["helped"], "" if report["tests"] else front["compared"])
            if sentence
        ],
        answers=answers,
        cost=_cost(report),
        commands=front["commands"],
        pictures=_picture(report, drawings),
    )


def front_of_comparison(report: ComparisonReport, drawings: Drawings) -> FrontView:
    """Return the first screen of a comparison of several runs."""
    caption = f"Fused adapter minus mean seed, paired by item, with {report['confidence_percent']} % intervals"
    differing = ", ".join(report["differing"])
    settings = f"The runs differ in {differing}." if differing else "The runs have the same settings."
    lines = [*([] if report["best"] is None else [report["best"]]), report["verdict"], settings]
    return FrontView(title=report["title"], lines=lines, pictures=drawings.picture("runs", caption))


def _train_or_fuse(verdict: str, sentences: Sequence[str]) -> Said:
    """Say the verdict in a word, and what to do next."""
    answer = {FUSE: "Fuse.", TRAIN_LONGER: "Train longer."}.get(verdict, "That cannot be said.")
    following = [sentence for sentence in sentences if sentence.startswith("Next: ")]
    if following:
        return Said("Train longer, or fuse?", answer, following[0])
    return Said("Train longer, or fuse?", "", sentences[0].removeprefix("Train longer, or fuse? "))


def _about(report: Report) -> str:
    """Say what kind of run it is."""
    parts = []
    if (plan := report["cost"]) is not None:
        listed = f"{'seed' if len(plan['seeds']) == 1 else 'seeds'} {', '.join(map(str, plan['seeds']))}"
        swept = replica_count(plan) != len(plan["seeds"])
        parts.append(f"{replica_count(plan)} replicas of {listed}" if swept else listed)
        parts.append(f"{plan['rows']:,} rows, {plan['steps']:,} steps each")
    if report["method"] is not None and report["merged"] is not None:
        parts.append(f"merged by {report['method']}")
    return "; ".join([*parts, f"run {report['run']}"])


def _cost(report: Report) -> list[str]:
    """Return what the run took: tokens, time, memory."""
    front, amounts = report["front"], []
    if front["tokens"] is not None:
        amounts.append(f"{amount_text(front['tokens'])} tokens")
    if front["seconds"] is not None:
        amounts.append(f"{duration_text(front['seconds'])} before the test")
    if front["peak_gib"] is not None:
        amounts.append(f"{front['peak_gib']:.2f} GiB")
    return amounts


def _picture(report: Report, drawings: Drawings) -> list[Picture]:
    """Return one figure: the scores, or else the losses of the training."""
    caption = "Validation loss" if report["training"]["validation"] else "Training loss"
    if report["tests"]:
        caption = f"Right test items, with {CONFIDENCE_PERCENT} % intervals"
    return drawings.picture("front", caption)


def front_labels(report: Report) -> list[str]:
    """Return the labels that the first figure shows: base, seeds, soup and fused adapter, and what is advised."""
    return [BASE, *report["seeds"], SOUP, FUSED, *([report["front"]["adapter"]] if report["front"]["adapter"] else [])]
