"""The sections about scores: of each test set and its sub-domains, and of what an adapter cost beside its score."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from seedlora.names import FUSED, MEANING
from seedlora.records.report import AdapterComparison, AdapterRow, DomainRow, Report, RightSeeds, TestSet
from seedlora.report.parts import (
    Drawings,
    Section,
    Table,
    count_text,
    loss_text,
    make_table,
    number_text,
    percent_text,
    points_text,
)
from seedlora.scores.intervals import CONFIDENCE_PERCENT
from seedlora.scores.wording import LOSS, PERCENT, SCORES


def sections_of_tests(report: Report, drawings: Drawings) -> list[Section]:
    """Return two sections for each test set: its scores and its sub-domains."""
    return [
        section
        for i, test in enumerate(report["tests"])
        for section in (
            _scores(test, drawings, i, report["front"]["compared"] if i == 0 else ""),
            _domains(test, drawings, i),
        )
    ]


def _scores(test: TestSet, drawings: Drawings, place: int, verdict: str) -> Section:
    """Show scores and comparisons of one test set, under the verdict on them."""
    spread = ""
    if test["seed_spread"] is not None:
        spread = f" Mean seed {percent_text(test['mean_seed'])}, standard deviation of the seeds "
        spread += f"{percent_text(test['seed_spread'])} points."
    lines = [*([verdict] if verdict else []), f"Scored: {test['metric']}; n = {test['n']:,}.{spread}"]
    notes = [f"Scores are in percent, with {CONFIDENCE_PERCENT} % Wilson intervals."]
    tables = [
        make_table(
            {
                "adapter": lambda row: row["adapter"],
                "right": lambda row: count_text(row["right"]),
                "score": lambda row: percent_text(row["value"]),
                "interval": lambda row: PERCENT.between(row["low"], row["high"]),
            },
            test["scores"],
            caption=f"Right items of {test['n']:,}",
            sortable=True,
        )
    ]
    scored = {row["adapter"] for row in test["scores"]}
    if controls := [(label, meaning) for label, meaning in MEANING.items() if label in scored]:
        tables.append(Table(["control", "what it is"], controls, words=True, caption="The controls"))
    if test["comparisons"]:
        notes.append(_say_differences(test))
        tables.append(_comparison_table(test))
    if test["by_right_seeds"]:
        tables.append(_right_seeds_table(test["by_right_seeds"]))
    pictures = [
        *drawings.picture(f"scores-{place}", "Score of each adapter"),
        *drawings.picture(f"methods-{place}", "Difference from the mean seed, paired by item"),
    ]
    return Section(
        f"Scores: {test['name']}", lines, tables, pictures, notes=notes, unfolded=place == 0, gist=_best(test)
    )


def _best(test: TestSet) -> str:
    """Name what gets most of the items."""
    most = max(row["right"] for row in test["scores"])
    best = [row["adapter"] for row in test["scores"] if row["right"] == most]
    return f"most right: {', '.join(best)}" if most and len(best) < 4 else ""


def _say_differences(test: TestSet) -> str:
    """Say how the table of comparisons is to be read."""
    tasks = test["tasks"]
    return (
        "Differences are in points, paired by item, with intervals; p is McNemar's exact test"
        + (f", Holm the same adjusted over the {tasks} tasks" if tasks > 1 else "")
        + ", Holm (table) the same adjusted for all tests of this table. What is shown is said by the interval "
        "alone, without adjustment: of many rows, some would show a difference by chance. The mean seed is not "
        f"right or wrong on an item, so it has no such test. The best seed, {test['best_seed']}, was picked by "
        "this test set, which flatters it."
    )


def _comparison_table(test: TestSet) -> Table:
    """Show the comparisons, the fused adapter's first; the others as they were scored."""
    columns: dict[str, Callable[[AdapterComparison], str]] = {
        "adapter": lambda row: row["adapter"],
        "against": lambda row: row["against"],
        "difference": points_text,
        "shown": lambda row: SCORES.word(row["value"]) if row["shown"] else "nothing",
        "p": lambda row: number_text(row["p_value"]),
    }
    if test["tasks"] > 1:
        columns["Holm"] = lambda row: number_text(row["p_value_holm"])
    columns["Holm (table)"] = lambda row: number_text(row["p_value_holm_table"])
    rows = sorted(test["comparisons"], key=lambda row: row["adapter"] != FUSED)
    return make_table(columns, rows, caption="Differences in points, paired by item", sortable=True)


def _right_seeds_table(rows: list[RightSeeds]) -> Table:
    labels = list(rows[0]["right"])
    return Table(
        ["seeds right", "items", *(f"{label} right" for label in labels)],
        [
            [str(row["right_seeds"]), count_text(row["items"]), *(count_text(row["right"][label]) for label in labels)]
            for row in rows
        ],
        caption="Items by how many seeds get them right, and who else does",
    )


def _domains(test: TestSet, drawings: Drawings, place: int) -> Section:
    """Show who is right in which sub-domain."""
    rows = test["domains"]
    if not rows:
        return Section("")
    several = rows[0]["best_seed"] is not None
    notes = ["One item counts once under each property that the data names."]
    if several:
        notes.append(
            "The lead is the best seed's score minus the mean seed's, in points; by chance is the mean lead when each "
            "item's outcomes are dealt to the seeds anew, p the share of deals that lead as far. No adjustment is made "
            "for the number of rows."
        )
    columns: Mapping[str, Callable[[DomainRow], str]] = {
        "sub-domain": lambda row: row["domain"],
        "items": lambda row: count_text(row["items"]),
        "best seed": lambda row: row["best_seed"] or "",
        "lead": lambda row: percent_text(row["lead"]),
        "by chance": lambda row: percent_text(row["lead_by_chance"]),
        "p": lambda row: number_text(row["p_value"]),
    }
    chance = "" if test["chance"] is None else f" The line in the scale is chance, {percent_text(test['chance'])}."
    note = f"In brackets are all that get most.{chance}"
    caption = "Lead of the best seed in each sub-domain"
    return Section(
        f"Who is right where: {test['name']}",
        tables=[make_table(columns, rows, caption=caption, sortable=True)] if several else [],
        pictures=drawings.picture(f"domains-{place}", "Right items in percent by sub-domain", note),
        notes=notes,
    )


def cost_and_score(report: Report, drawings: Drawings) -> Section:
    """Show what went into each adapter beside its score, if there is a figure of it."""
    sample = report["train_sample"]
    over = "the training loss, mean of the last tenth of the steps"
    if sample is not None:
        over = f"the loss on {sample['rows']:,} training rows, the same for all"
    pictures = [
        *drawings.picture(
            "budget",
            "Score over the tokens that went into an adapter",
            "Soup and the fused one have the tokens of all seeds. Those with the same tokens stand side by side.",
        ),
        *drawings.picture("loss-score", f"Score over {over}"),
    ]
    if not pictures:
        return Section("")
    notes = [
        "Losses are in nats per token. That of the last steps is the mean over the last tenth of an adapter's "
        "training, each step on its own rows."
    ]
    columns: dict[str, Callable[[AdapterRow], str]] = {
        "adapter": lambda row: row["adapter"],
        "score": lambda row: percent_text(row["value"]),
    }
    if sample is not None:
        columns["loss on training rows"] = lambda row: loss_text(row["sample_loss"])
        notes.append(
            f"After the test all were scored on the same {sample['rows']:,} rows ({sample['tokens']:,} tokens), drawn "
            "from the training rows: some of them may be rows that an adapter did not get to. Intervals are of "
            f"{CONFIDENCE_PERCENT} %, over rows. All adapters share the rows, so a difference between two "
            "of them is surer than their intervals."
        )
    columns["loss of the last steps"] = lambda row: "" if row["train_loss"] is None else LOSS(row["train_loss"])
    columns["tokens"] = lambda row: count_text(row["tokens"])
    table = make_table(columns, report["adapters"], caption="What went into each adapter, and its score", sortable=True)
    return Section("Cost, loss and score", tables=[table], pictures=pictures, notes=notes)
