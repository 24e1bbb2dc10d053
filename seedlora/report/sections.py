"""The sections of a report, in order."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

from seedlora.names import FUSED, GAIN_SEED, GAIN_SOUP, GREEDY
from seedlora.records.cost import BaseIdentity, PlanRecord, replica_count
from seedlora.records.report import ModuleRow, Report, Share, WeightRecord
from seedlora.records.results import SampleLosses
from seedlora.records.selection import CandidateRecord, Controls, LossDifference, Selection, SubsetRecord
from seedlora.records.train_or_fuse import TrainOrFuseRecord
from seedlora.records.training import TrainedRow
from seedlora.report.examples import examples_section
from seedlora.report.parts import (
    Drawings,
    Section,
    Table,
    amount_text,
    count_text,
    make_table,
    number_text,
    percent_text,
)
from seedlora.report.score_sections import cost_and_score, sections_of_tests
from seedlora.report.sweep import sweep_section
from seedlora.scores.choices import choice_sentences
from seedlora.scores.train_or_fuse import UNKNOWN
from seedlora.scores.wording import LOSS_CHANGE, LOSSES, interval_text, judge


def sections(report: Report, drawings: Drawings) -> list[Section]:
    """Return the sections of a report, in order; some may be empty."""
    return [
        examples_section(report["examples"]),
        sweep_section(report["sweep"], drawings),
        *sections_of_tests(report, drawings),
        _train_or_fuse(report["train_or_fuse"]),
        *([] if report["selection"] is None else _selection(report["selection"], report["trained"], drawings)),
        cost_and_score(report, drawings),
        _training(report, drawings),
        *([] if report["weights"] is None else _weights(report["weights"], report, drawings)),
        _cost(report),
        Section("What was left out", items=report["left_out"]),
        Section("What is missing", items=report["missing"]),
        Section("What else can be compared", items=report["more"]),
        *_reproduction(report),
    ]


def _train_or_fuse(record: TrainOrFuseRecord | None) -> Section:
    """Show the numbers behind the verdict on training longer."""
    if record is None:
        return Section("")
    note = (
        "Soup of n seeds costs what one seed costs that is trained n times as long. Soup is expected to be better "
        "where its gain over the mean seed is more than what a seed's loss falls by in n times the steps."
    )
    gist = record["verdict"] if record["verdict"] != UNKNOWN else "cannot be said"
    return Section("Train longer, or fuse?", items=record["sentences"], notes=[note], gist=gist)


def _selection(selection: Selection, trained: Sequence[str], drawings: Drawings) -> list[Section]:
    """Show what the validation rows decided, and what they say of the outcome."""
    by = {"loss": "the lowest loss", "match": "most exact matches"}[selection["by"]]
    lines = [f"{selection['rows']:,} rows, {selection['tokens']:,} tokens; best is {by}. No test item was looked at."]
    notes = [
        "Losses are in nats per token; match is the share of rows that greedy decoding answers exactly, in percent."
    ]
    if (chosen := selection["chosen"]) is not None:
        tried = len(selection["candidates"])
        lines.append(
            f"Asked for {selection['asked']}; {chosen['name']} was chosen among {tried} rules, so its scores on these "
            "rows flatter it."
        )
    for label, row in selection["against"].items():
        name = f"{label}, the best seed of these rows" if label == selection["best_seed"] else label
        lines.append(_say_loss_difference(name, row))
    lines += choice_sentences(selection)
    lines += _say_controls(selection["controls"], trained)
    scores = [[label, f"{row['loss']:.4f}", percent_text(row["match"])] for label, row in selection["scores"].items()]
    tables = [Table(["adapter", "loss", "match"], scores, caption="Validation loss and exact matches", sortable=True)]
    if selection["candidates"]:
        tables.append(
            _rules_table("rule", "The rules that were tried, on the validation rows", selection["candidates"])
        )
    if GAIN_SOUP in selection["controls"]:
        first = f"tried for {GAIN_SOUP}"
        tables.append(
            _rules_table(
                first, f"What was {first}, on the validation rows", selection["controls"][GAIN_SOUP]["candidates"]
            )
        )
    pictures = [
        *drawings.picture("gain-curve", "Validation loss over the gain on the mean update"),
        *drawings.picture(
            "candidates",
            "Validation loss of the rules that were tried",
            "What was chosen is drawn in the text's colour.",
        ),
    ]
    subsets = _subsets(selection["subsets"], drawings) if selection["subsets"] else Section("")
    gist = f"best of the seeds: {selection['best_seed']}" if selection["best_seed"] else ""
    return [Section("On the validation rows", lines, tables, pictures, notes=notes, gist=gist), subsets]


def _say_loss_difference(name: str, row: LossDifference) -> str:
    """Say what a difference between validation losses shows."""
    interval = f"{interval_text(row['low'], row['high'], LOSS_CHANGE)}"
    judged = judge(row["value"], shown=row["shown"], called=LOSSES)
    return f"Loss of the fused adapter minus that of {name}: {LOSS_CHANGE(row['value'])} ({interval}), {judged}."


def _say_controls(controls: Controls, trained: Sequence[str]) -> list[str]:
    """Say what each control that was tuned is."""
    lines = []
    if GAIN_SEED in controls:
        lines.append(f"{GAIN_SEED} is {controls[GAIN_SEED]['seed']}, the best seed of these rows.")
    if GREEDY in controls:
        members = ", ".join(trained[i] for i in controls[GREEDY]["members"])
        lines.append(f"{GREEDY} is the soup of {members}.")
    if GAIN_SOUP in controls:
        lines.append(f"{GAIN_SOUP} is {controls[GAIN_SOUP]['name']}, the best of those in its table.")
    return lines


def _rules_table(first: str, caption: str, rows: Sequence[CandidateRecord]) -> Table:
    return make_table(
        {
            first: lambda row: row["name"],
            "loss": lambda row: f"{row['loss']:.4f}",
            "match": lambda row: percent_text(row["match"]),
        },
        rows,
        caption=caption,
        sortable=True,
    )


def _subsets(rows: Sequence[SubsetRecord], drawings: Drawings) -> Section:
    """Show losses by the seeds that are merged."""
    note = (
        "Validation loss, in nats per token, of every subset of the seeds, or of some of each size where there are "
        "many. In the figure lines join the means."
    )
    header = ["seeds", *(f"{label}, loss" for label in rows[0]["loss"])]
    cells = [[", ".join(row["seeds"]), *(f"{loss:.4f}" for loss in row["loss"].values())] for row in rows]
    tables = [Table(header, cells, caption="Validation loss of subsets of the seeds", sortable=True)]
    pictures = drawings.picture("subsets", "Validation loss by the number of seeds fused")
    return Section("How many seeds", tables=tables, pictures=pictures, notes=[note])


def _training(report: Report, drawings: Drawings) -> Section:
    """Show the losses over the training."""
    training = report["training"]
    stretch = training["steps_per_point"]
    averaged = "" if stretch == 1 else f" Each point is the mean of {stretch} steps."
    rows = [
        [label, count_text(end["step"]), f"{end['last']:.4f}", f"{end['lowest']:.4f}"]
        for label, end in training["ends"].items()
    ]
    caption = "Validation loss of the last validation in training, and the lowest"
    header = ["adapter", "after step", "validation loss", "lowest"]
    shown = training["train"] or rows
    return Section(
        "Training",
        tables=[Table(header, rows, caption=caption, sortable=True)] if rows else [],
        pictures=[
            *drawings.picture("train", "Training loss", f"Each adapter on the rows of its step.{averaged}"),
            *drawings.picture(
                "validation", "Validation loss", "Each adapter, and the seeds fused as they were after that step."
            ),
        ],
        notes=["Losses are in nats per token."] if shown else [],
        gist=", ".join(f"{label} {end['last']:.4f}" for label, end in training["ends"].items() if label == FUSED),
    )


def _weights(weights: WeightRecord, report: Report, drawings: Drawings) -> list[Section]:
    """Show how alike the seeds are, and what their weights look like."""
    seeds = report["trained"]
    cosines = [[seed, *(f"{value:.3f}" for value in row)] for seed, row in zip(seeds, weights["cosines"], strict=False)]
    note = "Cosines of the updates, each adapter taken as one vector; those of unrelated adapters are near zero."
    several = len(seeds) > 1
    alike = Section(
        "How alike the seeds are",
        tables=[Table(["cosine", *seeds], cosines, caption="Cosine of two seeds' updates")] if several else [],
        pictures=[
            *drawings.picture("pairs", "Cosine of every pair of seeds"),
            *drawings.picture("cosines", "Cosine in every layer, mean over the pairs of seeds"),
        ],
        notes=[note] if several else [],
    )
    merged = report["merged"] is not None
    spectra, counted = weights["spectra"], weights["distributions"]
    gain = ["The gain is the norm of the fused update over that of the seeds' mean."] if merged else []
    notes = [
        "The effective rank is the exponential of the entropy of the singular values.",
        *gain,
        f"The layer in the middle is {spectra['path']}; the entries are those of {', '.join(counted['layers'])}.",
    ]
    middle = [
        [label, number_text(spectra["effective_rank"].get(label)), number_text(std)]
        for label, std in counted["std"].items()
    ]
    pictures = [
        *drawings.picture("spectra", f"Singular values in {spectra['path']}", "It is the layer in the middle."),
        *drawings.picture(
            "distributions",
            f"Distribution of {counted['entries']:,} entries of each update",
            f"They are those of {', '.join(counted['layers'])}.",
        ),
        *drawings.picture("gains", "Gain of the merge in every layer"),
    ]
    caption = "Effective rank of a layer in the middle, and standard deviation of entries"
    tables = [
        _modules_table(weights["modules"], merged=merged),
        Table(["adapter", "effective rank", "standard deviation"], middle, caption=caption, sortable=True),
    ]
    return [alike, Section("Weights", tables=tables, pictures=pictures, notes=notes)]


def _modules_table(rows: Sequence[ModuleRow], *, merged: bool) -> Table:
    """Show the means over the layers of each module type; of the fused adapter, if there is one."""
    columns: dict[str, Callable[[ModuleRow], str]] = {
        "module": lambda row: row["module"],
        "layers": lambda row: str(row["layers"]),
        "cosine": lambda row: number_text(row["mean_cosine"]),
    }
    if merged:
        columns["gain"] = lambda row: number_text(row["applied_gain"])
    columns["effective rank"] = lambda row: number_text(row["effective_rank"])
    if merged:
        columns["fused"] = lambda row: number_text(row["merged_effective_rank"])
    return make_table(columns, rows, caption="Means over the layers of each module type", sortable=True)


def _cost(report: Report) -> Section:
    """Show the plan, the times, what the ensemble takes beside one seed, and how long each adapter was trained."""
    shares: Mapping[str, Callable[[Share], str]] = {
        "what": lambda row: row["what"],
        "all seeds": lambda row: amount_text(row["all"]),
        "one seed": lambda row: amount_text(row["one"]),
    }
    amounts = _amounts(report["cost"], report["train_sample"])
    tables = [
        Table(["what", "how much"], amounts, caption="The plan") if amounts else None,
        _times_table(report["took"]) if report["took"] else None,
        make_table(shares, report["shares"], caption="All seeds beside one") if report["shares"] else None,
        _trained_table(report["trained_on"]) if report["trained_on"] else None,
    ]
    return Section("Cost", tables=[table for table in tables if table is not None])


def _amounts(plan: PlanRecord | None, sample: SampleLosses | None) -> list[list[str]]:
    """Return the cells of the plan, and of what was scored beside the test."""
    rows = []
    if plan is not None:
        rows += [
            ["budget", plan["budget"]],
            ["steps of each seed", count_text(plan["steps"])],
            ["rows in a step of each seed", count_text(plan["batch"])],
            ["seeds" if replica_count(plan) == len(plan["seeds"]) else "replicas", str(replica_count(plan))],
            ["passes", str(plan["passes"])],
            ["parameters of the frozen base", count_text(plan["base_parameters"])],
        ]
    if sample is not None:
        rows.append(["training rows scored after the test", count_text(sample["rows"])])
        rows.append(["by so many adapters", str(len(sample["losses"]))])
    return rows


def _times_table(took: Mapping[str, Mapping[str, float]]) -> Table:
    """Show seconds by phase."""
    phases = list(dict.fromkeys(phase for times in took.values() for phase in times))
    cells = [
        [label, *(f"{times[phase]:,.1f}" if phase in times else "" for phase in phases)]
        for label, times in took.items()
    ]
    return Table(["wall time, seconds", *phases], cells, caption="Where the time went")


def _trained_table(rows: Mapping[str, TrainedRow]) -> Table:
    """Show how long each adapter was trained; the step that was kept, where one was."""
    columns: dict[str, Callable[[tuple[str, TrainedRow]], str]] = {
        "adapter": lambda row: row[0],
        "steps": lambda row: count_text(row[1]["steps"]),
        "tokens seen": lambda row: amount_text(row[1].get("tokens")),
        "of these scored": lambda row: amount_text(row[1].get("scored")),
    }
    if any(row["kept_step"] is not None for row in rows.values()):
        columns["step kept"] = lambda row: count_text(row[1]["kept_step"])
    return make_table(columns, rows.items(), caption="How long each adapter was trained")


def _reproduction(report: Report) -> list[Section]:
    """Show what it takes to make the run again."""
    record = report["reproduce"]
    lines = []
    if report["method"] is not None:
        option = ", ".join(f"{key}={value}" for key, value in record["options"].items())
        lines.append(f"Merge method: {report['method']}{f' ({option})' if option else ''}.")
    tables = [
        ("Libraries", ["library", "version"], list(record["versions"].items())),
        (
            "The base model",
            ["base model", "what tells it from another"],
            _identity(record["base"]) if record["base"] else [],
        ),
        ("The adapters", ["adapter", "sha256 of the weights"], list(record["sha256"].items())),
    ]
    settings = [(key, json.dumps(value)) for key, value in record["settings"].items()]
    return [
        Section("How to reproduce", lines, code=record["command"]),
        Section(
            "Versions and hashes",
            tables=[Table(header, rows, words=True, caption=caption) for caption, header, rows in tables if rows],
        ),
        Section("Settings", tables=[Table(["setting", "value"], settings, words=True, caption="Settings of the run")]),
    ]


def _identity(base: BaseIdentity) -> list[tuple[str, str]]:
    """Return the cells of what tells the base model from another."""
    if "revision" in base:
        return [("commit on the hub", str(base["revision"]))]
    files = [(name, f"{size:,} bytes") for name, size in base["bytes"].items()]
    return [("config.json", f"sha256 {base['config_sha256']}"), *files]
