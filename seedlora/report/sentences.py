"""Sentences of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from seedlora.names import ALL_CONTROLS, FUSED, GREEDY, LONG_SEED, NO_CONTROLS, SOUP, nothing_for_one_seed
from seedlora.report.stored import Facts

ANSWERED_BY_OTHERS = (
    "Tasks were scored by generation before the seeds were fused anew, and {} answered with other weights: these "
    "scores are not shown. train.py test --evaluate scores the adapters of today."
)


def left_out(found: Facts, *, excluded: Facts, record: Facts) -> list[str]:
    """What was refused, dropped, stopped or chosen away, a sentence each."""
    plan, selection = found["cost"] or {}, found["selection"] or {}
    said = [f"{seed} was left out: {reason}." for seed, reason in excluded.items()]
    said += [f"Of the rows of the data: {sentence}." for sentence in plan.get("left_out", ())]
    for label, row in found["trained_on"].items():
        if row["stopped"]:
            said.append(f"{label} was stopped after step {row['steps']:,}: its validation loss improved no more.")
        if row["kept_step"] is not None:
            said.append(f"Of {label} the weights of step {row['kept_step']:,} were kept, its best validation.")
    if names := selection.get("not_finite"):
        said.append(f"Without a finite validation loss, and so not chosen: {', '.join(names)}.")
    if (greedy := selection.get("controls", {}).get(GREEDY)) is not None:
        members = [found["trained"][i] for i in greedy["members"] if i < len(found["trained"])]
        dropped = [seed for seed in found["trained"] if seed not in members]
        if dropped:
            said.append(f"The greedy soup is of {', '.join(members)}; {', '.join(dropped)} would harm.")
    if "compression" in record:
        mean, largest = (record["compression"][f"relative_error_{key}"] for key in ("mean", "max"))
        said.append(
            "The fused adapter is compressed: relative Frobenius error "
            f"{mean:.3g} on average over the layers, {largest:.3g} at most."
        )
    return said


def missing(found: Facts, *, excluded: Facts, config: Facts, record: Facts) -> list[str]:
    """What was never there, a sentence each."""
    said = []
    pending = [seed for seed in found["seeds"] if seed not in found["trained"] and seed not in excluded]
    if pending:
        said.append(
            f"The run is not finished: {_listed(pending)} not trained; repeat its command with --resume "
            f"--ensemble.dirpath and this folder."
        )
    if len(found["trained"]) == 1 and not pending:
        said.append("Only one seed was trained: there is no spread between seeds, and nothing to average.")
    if not record and found["trained"] and not pending:
        said.append("Nothing was fused.")
    if not found["training"]["train"]:
        said.append("No training losses are stored.")
    if not found["training"]["validation"]:
        said.append("There was no validation.")
    if not found["tests"]:
        said.append("No test set was scored, or the outcomes of its items are not stored.")
    elif found["train_sample"] is None:
        said.append(
            "No training rows were scored beside the test, so only what was trained has a training loss; "
            "train.py test --ensemble.dirpath and this folder scores them."
        )
    if found["cost"] is None:
        said.append("The plan and the versions of the libraries are not stored.")
    elif len(found["cost"]["seeds"]) > 1 and not found["took"].get(LONG_SEED):
        said.append(
            "No seed was trained alone, so what one takes is known in tokens and estimated in memory; the time is not "
            "known."
        )
    if not config:
        said.append("There is no config.yaml: the run was not started by train.py.")
    return said


def further_comparisons(found: Facts, ensemble: Mapping[str, Any]) -> list[str]:
    """The comparisons that the run does not hold, and the options that give them."""
    compare, controls = ensemble.get("compare"), ensemble.get("controls") or NO_CONTROLS
    if len(found["trained"]) == 1:
        options = {
            "--merge auto": ensemble.get("merge") == "auto",
            "--compare": compare,
            "--controls": controls != NO_CONTROLS,
        }
        said = nothing_for_one_seed(options)
        return [] if said is None else [said]
    return [
        *([] if compare else ["Other methods on the same items: --compare ties,knots_ties."]),
        *(
            []
            if controls == ALL_CONTROLS
            else ["One seed for the tokens of all, and one with the rank of all: --controls."]
        ),
        *(
            []
            if controls != NO_CONTROLS
            else [
                "Tuned gains, the greedy soup, every subset of the seeds: --controls untrained, with validation rows."
            ]
        ),
    ]


def verdict_of(found: Facts) -> str:
    """The outcome on the first test set in one sentence; without one, what validation says."""
    for test in found["tests"]:
        rows = test["comparisons"]
        for label in (FUSED, SOUP):
            row = next((row for row in rows if row["adapter"] == label), None)
            if row is None:
                continue
            said = f"{_named(label, found['method'])}: {_judged(row, 'the ' + row['against'], found)}"
            soup_row = next((r for r in rows if r["adapter"] == label and r["against"] == SOUP), None)
            against = "" if soup_row is None else f"; {_judged(soup_row, SOUP, found)}"
            return f"{said}{against} (n = {test['n']})."
    name = _named(found["merged"] or FUSED, found["method"])
    selection = found["selection"] or {"against": {}}
    halves = []
    for label, row in selection["against"].items():
        if label != found["merged"]:
            judged = "no different from" if not row["shown"] else "lower than" if row["value"] < 0 else "higher than"
            interval = f"{found['confidence_percent']} % interval {row['low']:+.4f} to {row['high']:+.4f}"
            halves.append(
                f"{judged} {label}'s{'' if row['shown'] else ' as far as shown'}, {row['value']:+.4f} ({interval})"
            )
    if halves:
        own = ", on which it was chosen, which flatters it" if selection["chosen"] else ""
        return f"{name} was not tested. Its loss on the {selection['rows']} validation rows{own}: {'; '.join(halves)}."
    last = {label: curve["last"] for label, curve in found["training"]["ends"].items()}
    if FUSED in last and (seeds := [last[seed] for seed in found["trained"] if seed in last]):
        return (
            f"{name} was not tested; its validation loss is {last[FUSED]:.3f}, "
            f"that of the seeds {min(seeds):.3f} to {max(seeds):.3f}."
        )
    return "Nothing was scored against the seeds, so there is no verdict."


def _judged(row: Mapping[str, Any], other: str, found: Facts) -> str:
    """A difference on test items in words, with its interval."""
    judged = "no difference from" if not row["shown"] else "better than" if row["value"] > 0 else "worse than"
    return f"{judged} {other}{'' if row['shown'] else ' shown'}, {points(row, found['confidence_percent'])}"


def points(row: Mapping[str, Any], percent: int) -> str:
    """Write a difference in points with its interval."""
    interval = f"{percent} % interval {100 * row['low']:+.1f} to {100 * row['high']:+.1f}"
    return f"{100 * row['value']:+.1f} points ({interval})"


def _named(label: str, method: str | None) -> str:
    return "Soup" if label == SOUP else f"The fused adapter ({method})"


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'}"
