"""The sections of a comparison of several runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from seedlora.records.report import AdapterScore, ComparisonReport, RunComparison, RunRow
from seedlora.report.parts import (
    Section,
    Table,
    amount_text,
    count_text,
    duration_text,
    make_table,
    number_text,
    percent_text,
    points_text,
)

#: Settings that tell the rows of two runs apart, and say nothing else.
CHECKSUMS = ("sha256 of the train rows", "sha256 of the val rows")


def comparison_sections(report: ComparisonReport) -> list[Section]:
    """Return the sections of a comparison, in order."""
    note = (
        "Scores are in percent, differences in points with intervals of "
        f"{report['confidence_percent']} %, paired by item. The spread is the standard deviation of the seeds' scores, "
        "the cosine the mean over pairs of seeds. Two runs stand against each other where they were tested on the same "
        "items. A click on the name of a column sorts by it."
    )
    tables = [runs_table(report), *([paired_table(report["paired"])] if report["paired"] else [])]
    return [
        Section("The runs", tables=tables, notes=[note], unfolded=True),
        Section(
            "Verdict of each run", items=[f"{row['run']}: {row['verdict']}" for row in report["runs"]], unfolded=True
        ),
        Section("What is missing", items=report["missing"]),
    ]


def runs_table(report: ComparisonReport) -> Table:
    """Show several runs, one row each, with the settings that differ."""

    def setting(name: str) -> Callable[[RunRow], str]:
        return lambda row: row["settings"].get(name, "")

    checksums = [name for name in report["differing"] if name in CHECKSUMS]
    columns: dict[str, Callable[[RunRow], str]] = {
        "run": lambda row: row["run"],
        "method": lambda row: row["method"] or "",
        **{name: setting(name) for name in report["differing"] if name not in CHECKSUMS},
        "fused": lambda row: _score_text(row["fused"]),
        "against mean seed": lambda row: points_text(row["against_mean_seed"]),
        "mean seed": lambda row: percent_text(row["mean_seed"]),
        "spread": lambda row: percent_text(row["seed_spread"]),
        "soup": lambda row: _score_text(row["soup"]),
        "base": lambda row: _score_text(row["base"]),
        "n": lambda row: count_text(row["n"]),
        "use": lambda row: row["use"] or "",
        "seeds": lambda row: str(row["seeds"]),
        "cosine": lambda row: number_text(row["mean_cosine"]),
        "tokens": lambda row: "" if row["tokens"] is None else amount_text(row["tokens"]),
        "time": lambda row: "" if row["seconds"] is None else duration_text(row["seconds"]),
        **{name: setting(name) for name in checksums},
    }
    return make_table(columns, report["runs"], caption="Settings that differ, scores and cost", sortable=True)


def paired_table(rows: Sequence[RunComparison]) -> Table:
    """Show the fused adapters of two runs on the same items, one row for each pair."""
    return make_table(
        {
            "fused adapter of": lambda row: row["run"],
            "against that of": lambda row: row["against"],
            "difference": points_text,
            "p": lambda row: number_text(row["p_value"]),
            "Holm (table)": lambda row: number_text(row["p_value_holm_table"]),
        },
        rows,
        caption="Fused adapters of two runs on the same items",
        sortable=True,
    )


def _score_text(row: AdapterScore | None) -> str:
    return percent_text(None if row is None else row["value"])
