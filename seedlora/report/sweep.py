"""Show the validation loss of a sweep over its options."""

from __future__ import annotations

from seedlora.names import GREEDY, SOUP, seed_of
from seedlora.records.report import TrainingCurves
from seedlora.records.sweep import SweepRecord, SweepRow
from seedlora.report.parts import Drawings, Section, Table
from seedlora.report.stored import StoredRun
from seedlora.scores.wording import LOSS


def sweep_record(run: StoredRun, curves: TrainingCurves) -> SweepRecord | None:
    """Return the validation loss of each replica of a sweep, by its options; None if nothing is swept.

    It is the loss of the adapters as they were written, where these were scored, and else that of the last validation.

    Args:
        run: what is stored.
        curves: of the run.
    """
    own = {} if run.cost is None else run.cost["plan"].get("replicas", {})
    if not any(own.values()):
        return None
    scores = {} if run.selection is None else run.selection["scores"]
    losses = {label: score["loss"] for label, score in scores.items()}
    if not losses:
        losses = {label: end["last"] for label, end in curves["ends"].items()}
    rows: list[SweepRow] = []
    for label, values in own.items():
        row = next((row for row in rows if row["values"] == values), None)
        if row is None:
            row = {"values": values, "losses": {}, "mean": None, "dropped": {}}
            rows.append(row)
        seed, trained = f"seed {seed_of(label)}", run.trained_on.get(label)
        if trained is not None and "dropped" in trained and "validation_loss" in trained:
            row["dropped"][seed] = {"step": trained["dropped"], "loss": trained["validation_loss"]}
        elif label in losses:
            row["losses"][seed] = losses[label]
    for row in rows:
        row["mean"] = sum(row["losses"].values()) / len(row["losses"]) if row["losses"] else None
    ended = [label for label in own if label in losses and "dropped" not in run.trained_on.get(label, ())]
    best = min(ended, key=losses.__getitem__, default=None)
    sentence = "No replica was validated, so nothing is said of the swept options."
    if best is not None:
        merged = [f"{label} has {LOSS(losses[label])}" for label in (SOUP, GREEDY) if label in losses]
        parts = [f"The best replica of the validation rows is {best}, with a loss of {LOSS(losses[best])}", *merged]
        sentence = "; ".join(parts) + "."
    return {"options": list(next(iter(own.values()))), "rows": rows, "best": best, "sentences": [sentence]}


def sweep_table(record: SweepRecord) -> Table:
    """Make a table of validation losses: a row for each set of values, a column for each option and each seed.

    Of a replica that was dropped it has the loss then, with the step.
    """
    there = [{**row["losses"], **row["dropped"]} for row in record["rows"]]
    seeds = list(dict.fromkeys(seed for row in there for seed in row))
    several = any(len(row) > 1 for row in there)
    rows = []
    for row in record["rows"]:
        losses, mean = row["losses"], row["mean"]
        shown = {seed: f"{loss:.4f}" for seed, loss in losses.items()}
        shown |= {seed: f"{drop['loss']:.4f} dropped at {drop['step']:,}" for seed, drop in row["dropped"].items()}
        cells = [shown.get(seed, "") for seed in seeds]
        values = [_value_text(value) for value in row["values"].values()]
        rows.append([*values, *cells, *(["" if mean is None else f"{mean:.4f}"] if several else [])])
    header = [*record["options"], *seeds, *(["mean"] if several else [])]
    return Table(header, rows, caption="Validation loss by the options that are swept", sortable=True)


def _value_text(value: float | str) -> str:
    """Write a value.

    >>> [_value_text(value) for value in (0.002, 16, "linear")]
    ['0.002', '16', 'linear']
    """
    return value if isinstance(value, str) else f"{value:g}"


def sweep_section(record: SweepRecord | None, drawings: Drawings) -> Section:
    """Show what was swept; empty if nothing was."""
    if record is None:
        return Section("")
    picture = drawings.picture("sweep", "Validation loss over the swept options", "A line for each seed.")
    return Section(
        "What was swept",
        record["sentences"],
        [sweep_table(record)],
        picture,
        notes=["Losses are in nats per token."],
        gist="" if record["best"] is None else f"best {record['best']}",
        unfolded=True,
    )
