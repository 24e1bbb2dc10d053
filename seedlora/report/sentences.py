"""Say in sentences what a run shows, and what it lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from seedlora.names import ALL_CONTROLS, EQUAL_TOKENS, FUSED, GREEDY, LONG_SEED, NO_CONTROLS, SOUP, nothing_for_one_seed
from seedlora.records.cost import replica_count
from seedlora.records.report import AdapterComparison, TestSet, TrainingCurves
from seedlora.records.selection import Selection
from seedlora.records.training import unfinished_text
from seedlora.report.stored import StoredRun
from seedlora.scores.wording import LOSS, LOSS_CHANGE, LOSSES, difference_in_points, interval_text, judge

ANSWERED_BY_OTHERS = (
    "Tasks were scored by generation before the seeds were merged anew, and {} answered with other weights: these "
    "scores are not shown. python -m seedlora train test --evaluate scores the adapters of today."
)


def left_out(run: StoredRun) -> list[str]:
    """Say what was refused, dropped, stopped or chosen away, a sentence each."""
    sentences = [f"{seed} was left out: {reason}." for seed, reason in run.excluded.items()]
    if run.cost is not None:
        sentences += [f"Of the rows of the data: {sentence}." for sentence in run.cost["plan"].get("left_out", ())]
    for label, row in run.trained_on.items():
        if (text := unfinished_text(row)) is not None:
            sentences.append(f"{label} was not trained to the end: {text}.")
        if row["stopped"]:
            sentences.append(f"{label} was stopped after step {row['steps']:,}: its validation loss improved no more.")
        if row["kept_step"] is not None:
            on = "" if run.selection is None else f" on {run.selection['rows']:,} rows"
            sentences.append(f"Of {label} the weights of step {row['kept_step']:,} were kept, its best validation{on}.")
    if run.selection is not None:
        sentences += _left_out_of_choice(run.selection, run.trained)
    if run.fusion is not None and "compression" in run.fusion:
        errors = run.fusion["compression"]
        sentences.append(
            "The fused adapter is compressed: relative Frobenius error "
            f"{errors['relative_error_mean']:.3g} on average over the layers, {errors['relative_error_max']:.3g} at "
            "most."
        )
    return sentences


def _left_out_of_choice(selection: Selection, trained: Sequence[str]) -> list[str]:
    """Say what could not be chosen, and which seeds the greedy soup leaves out."""
    sentences = []
    if names := selection.get("not_finite"):
        sentences.append(f"Without a finite validation loss, and so not chosen: {', '.join(names)}.")
    if GREEDY in selection["controls"]:
        members = [trained[i] for i in selection["controls"][GREEDY]["members"] if i < len(trained)]
        dropped = [seed for seed in trained if seed not in members]
        if dropped:
            sentences.append(f"The greedy soup is of {', '.join(members)}; {', '.join(dropped)} would harm.")
    return sentences


def missing(run: StoredRun, tests: Sequence[TestSet], curves: TrainingCurves) -> list[str]:
    """Say what was never there, a sentence each."""
    sentences, pending = [], run.pending
    if pending:
        sentences.append(
            f"The run is not finished: {_list_names(pending)} not trained; repeat its command with --resume "
            f"--ensemble.dirpath and this folder."
        )
    if len(run.trained) == 1 and not pending:
        sentences.append("Only one seed was trained: there is no spread between seeds, and nothing to average.")
    if run.fusion is None and run.trained and not pending:
        sentences.append("Nothing was merged.")
    if not curves["train"]:
        sentences.append("No training losses are stored.")
    if not curves["validation"]:
        sentences.append("There was no validation.")
    if not tests:
        sentences.append("No test set was scored, or the outcomes of its items are not stored.")
    elif run.results is None or "train_sample" not in run.results:
        sentences.append(
            "No training rows were scored beside the test, so only what was trained has a training loss; "
            "python -m seedlora train test --ensemble.dirpath and this folder scores them."
        )
    if run.cost is None:
        sentences.append("The plan and the versions of the libraries are not stored.")
    elif replica_count(run.cost["plan"]) > 1 and not run.cost["took"].get(LONG_SEED):
        sentences.append(
            "No seed was trained alone, so what one takes is known in tokens and estimated in memory; the time is not "
            "known."
        )
    if not run.options.known:
        sentences.append("There is no config.yaml: the run was started before it was written.")
    if (why := run.options.only_from_python) is not None:
        sentences.append(f"The run was started from Python, and train.py cannot start the same one: {why}.")
    return sentences


def further_comparisons(run: StoredRun) -> list[str]:
    """Name the comparisons that the run does not hold, and the options that give them."""
    given = run.options
    if len(run.trained) == 1:
        options = {
            "--merge auto": given.merge == "auto",
            "--compare": given.compare,
            "--controls": given.controls != NO_CONTROLS,
        }
        sentence = nothing_for_one_seed(options)
        return [] if sentence is None else [sentence]
    sentences = []
    if not given.compare:
        sentences.append("Other methods on the same items: --compare ties,knots_ties.")
    if given.controls not in (ALL_CONTROLS, EQUAL_TOKENS):
        sentences.append("One seed for the tokens of all, and one with the rank of all: --controls.")
    if given.controls != EQUAL_TOKENS:
        sentences.append(
            "One seed with the rows of all in each step, at the best of three rates: --controls equal_tokens."
        )
    if given.controls == NO_CONTROLS:
        sentences.append(
            "Tuned gains, the greedy soup, every subset of the seeds: --controls untrained, with validation rows."
        )
    return sentences


def verdict_of(run: StoredRun, tests: Sequence[TestSet], curves: TrainingCurves) -> str:
    """Say the outcome on the first test set in one sentence; without one, what validation says."""
    if run.pending:
        return "The run is not finished, so there is no verdict."
    sentences = (_verdict_of_test(test, run.method) for test in tests)
    found = next((sentence for sentence in sentences if sentence is not None), None)
    if found is None and run.selection is not None:
        found = _verdict_of_validation(run, run.selection)
    if found is None:
        found = _verdict_of_curves(run, {label: curve["last"] for label, curve in curves["ends"].items()})
    return found or "Nothing was scored against the seeds, so there is no verdict."


def _verdict_of_test(test: TestSet, method: str | None) -> str | None:
    """Compare the fused adapter, or else soup, with the first that it was compared with, and with soup."""
    for label in (FUSED, SOUP):
        rows = [row for row in test["comparisons"] if row["adapter"] == label]
        if rows:
            parts = [_compare_scores(rows[0], f"the {rows[0]['against']}")]
            parts += [_compare_scores(row, SOUP) for row in rows if row["against"] == SOUP]
            return f"{_name_merged(label, method)}: {'; '.join(parts)} (n = {test['n']})."
    return None


def _compare_scores(row: AdapterComparison, other: str) -> str:
    """Say what a difference on test items shows, with its interval."""
    judged = judge(row["value"], shown=row["shown"], other=other)
    return f"{judged}, {difference_in_points(row['value'], row['low'], row['high'])}"


def _verdict_of_validation(run: StoredRun, selection: Selection) -> str | None:
    """Compare the losses on the validation rows, if there are any comparisons."""
    parts = []
    for label, row in selection["against"].items():
        if label != run.merged:
            judged = f"{LOSSES.word(row['value'])} than" if row["shown"] else "no different from"
            interval = interval_text(row["low"], row["high"], LOSS_CHANGE)
            said = "" if row["shown"] else " as far as shown"
            parts.append(f"{judged} {label}'s{said}, {LOSS_CHANGE(row['value'])} ({interval})")
    if not parts:
        return None
    own = ", on which it was chosen, which flatters it" if selection["chosen"] else ""
    name = _name_merged(run.merged or FUSED, run.method)
    return f"{name} was not tested. Its loss on the {selection['rows']} validation rows{own}: {'; '.join(parts)}."


def _verdict_of_curves(run: StoredRun, last: Mapping[str, float]) -> str | None:
    """Put the last validation losses of fused adapter and seeds side by side, if both are known."""
    seeds = [last[seed] for seed in run.trained if seed in last]
    if FUSED not in last or not seeds:
        return None
    return (
        f"{_name_merged(run.merged or FUSED, run.method)} was not tested; its validation loss is {LOSS(last[FUSED])}, "
        f"that of the seeds {LOSS(min(seeds))} to {LOSS(max(seeds))}."
    )


def _name_merged(label: str, method: str | None) -> str:
    return "Soup" if label == SOUP else f"The fused adapter ({method})"


def _list_names(names: Sequence[str]) -> str:
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'}"
