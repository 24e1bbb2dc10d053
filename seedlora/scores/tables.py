"""Tables and sentences for the terminal."""

from __future__ import annotations

from rich.table import Table

from seedlora.names import BEST_SEED, FUSED, MEANING, SOUP
from seedlora.scores.intervals import CONFIDENCE_PERCENT, Difference
from seedlora.scores.results import Results
from seedlora.scores.wording import PERCENT, POINTS, judge

#: Rows up to which each score's interval fits beside the differences.
SHORT_TABLE = 8


def titled_table(title: str) -> Table:
    """Make an empty table for the terminal, with its title, and its caption if it gets one, at the left."""
    return Table(title=title, title_justify="left", caption_justify="left")


def results_table(results: Results, *, method: str | None = None, title: str = "Test set") -> Table:
    """Make a table of scores with intervals and of the merged adapters' paired differences, in percent and points."""
    n = next(iter(results.scores.values())).n
    fused = f"; merged by {method}" if method else ""
    table = titled_table(f"{title}: {results.metric}, n = {n}, {CONFIDENCE_PERCENT} % intervals{fused}")
    longest = max(map(len, results.scores))
    table.add_column("adapter", overflow="fold", min_width=min(longest, 14))
    # Many adapters have controls and methods among them, with longer names; the report has every interval.
    spread = ["interval"] if len(results.scores) <= SHORT_TABLE else []
    # The best seed has no column, for want of room; the verdict names it.
    references = list(dict.fromkeys(name for d in results.differences.values() for name in d if name != BEST_SEED))
    for header in ("score", *spread, *(f"vs {name}" for name in references)):
        table.add_column(header, justify="right", no_wrap=True)
    for label, score in results.scores.items():
        differences = results.differences.get(label, {})
        table.add_row(
            label,
            PERCENT(score.value),
            *(PERCENT.between(score.low, score.high) for _ in spread),
            *(_points(differences.get(name)) for name in references),
            style="bold" if label == FUSED else None,
        )
    captions = [] if results.mean_seed is None else [f"mean seed {PERCENT(results.mean_seed)}"]
    captions += [] if results.seed_spread is None else [f"spread between seeds {PERCENT(results.seed_spread)}"]
    captions = [", ".join(captions)] if captions else []
    captions += ["differences are paired, in points"] if references else []
    controls = [f"{label}: {meaning}" for label, meaning in MEANING.items() if label in results.scores]
    table.caption = "\n".join(["; ".join(captions), *controls])
    return table


def verdict(results: Results) -> str:
    """Say what the test showed about the fused adapter, or else about all that were compared: one sentence each.

    Of the fused adapter also the difference from the best seed, and McNemar's p-values.
    """
    main = [label for label in (FUSED, SOUP) if results.differences.get(label)][:1]
    labels = main or [label for label, found in results.differences.items() if found]
    if not labels:
        return "Nothing was merged, so there is nothing to compare."
    sentences = []
    for label in labels:
        parts = [
            judge(d.value, shown=d.shown, other=reference) + (f" by {PERCENT(abs(d.value))} points" if d.shown else "")
            for reference, d in results.differences[label].items()
            if reference != BEST_SEED
        ]
        name = {FUSED: "The fused adapter", SOUP: "Soup"}.get(label, label)
        sentences.append(f"{name}: {'; '.join(parts)}.")
    if main and (best := results.differences[labels[0]].get(BEST_SEED)) is not None:
        sentences.append(
            f"Against {results.best_seed}, the best seed of these very items, which flatters it: {_points(best)}."
        )
        tests = {results.best_seed: best, SOUP: results.differences[labels[0]].get(SOUP)}
        tested = [f"{name} {d.p_value:.2g}" for name, d in tests.items() if d is not None and d.p_value is not None]
        sentences.append(f"McNemar's exact test, p against {', '.join(tested)}.")
    return "\n".join(sentences)


def _points(difference: Difference | None) -> str:
    return "" if difference is None else POINTS.with_interval(difference.value, difference.low, difference.high)
