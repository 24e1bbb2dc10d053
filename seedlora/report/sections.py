"""The sections of the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from seedlora.names import FUSED, GAIN_SEED, GAIN_SOUP, GREEDY, MEANING
from seedlora.report.figures import figures
from seedlora.report.stored import Facts


@dataclass(frozen=True)
class Table:
    """Cells as they are shown; the first column names the row, the others hold numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: bool = False


@dataclass(frozen=True)
class Picture:
    """A figure with what to look at."""

    svg: Markup
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of the page; empty parts are left out."""

    title: str
    lines: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    items: Sequence[str] = ()
    code: str | None = None


def runs_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row per run."""
    return Table(
        ["run", "method", "seeds", "n", "mean seed", "spread", "fused", "against mean seed", "cosine"],
        [
            [
                row["run"],
                row["method"] or "",
                str(row["seeds"]),
                _count(row["n"]),
                _percent(row["mean_seed"]),
                _percent(row["seed_spread"]),
                _percent(row["fused"] and row["fused"]["value"]),
                _interval(row["against_mean_seed"]),
                _number(row["mean_cosine"]),
            ]
            for row in rows
        ],
    )


def paired_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Fused adapters of two runs on the same items."""
    return Table(
        ["fused adapter of", "against that of", "difference", "p", "Holm (table)"],
        [
            [
                row["run"],
                row["against"],
                _interval(row),
                _number(row["p_value"]),
                _number(row["p_value_holm_table"]),
            ]
            for row in rows
        ],
    )


def sections(found: Facts) -> list[Section]:
    """Return the sections of the report, in order."""
    drawn = {name: Markup(svg) for name, svg in figures(found).items()}  # noqa: S704 - drawn by us, text escaped
    picture = lambda name, caption: [Picture(drawn[name], caption)] if name in drawn else []  # noqa: E731
    against = "Difference of each method and control from the mean seed, paired by item, with its interval."
    return [
        _advice(found),
        *(
            section
            for i, test in enumerate(found["tests"])
            for section in (
                _scores(
                    found,
                    test,
                    [
                        *picture(f"scores-{i}", "Score of each adapter with its interval."),
                        *picture(f"methods-{i}", against),
                    ],
                ),
                _domains(test, picture(f"domains-{i}", _domains_caption(test))),
            )
        ),
        *_selection(found, picture),
        _equal_budget(found, picture),
        _training(found, picture),
        *_weights(found, picture),
        _cost(found),
        Section("What was left out", items=found["left_out"]),
        Section("What is missing", items=found["missing"]),
        Section("What else can be compared", items=found["more"]),
        *_reproduce(found),
    ]


def _advice(found: Facts) -> Section:
    lines = list(found["advice"]["sentences"])
    if (better := found["advice"]["better"]) is not None:
        lines.append(f"The better adapter is in {better}, beside fused.")
    return Section("Which adapter to use", lines)


def _domains_caption(test: Facts) -> str:
    chance = "" if test["chance"] is None else f" The line in the scale is chance, {_percent(test['chance'])}."
    return f"Right items by sub-domain; in brackets all that get most.{chance}"


def _domains(test: Facts, pictures: Sequence[Picture]) -> Section:
    rows = test["domains"]
    if not rows:
        return Section("")
    several = rows[0]["best_seed"] is not None
    lines = ["One item counts once under each property that the data names."]
    if several:
        lines.append(
            "The lead is the best seed's score minus the mean seed's, in points; by chance is the mean lead when each "
            "item's outcomes are dealt to the seeds anew, p the share of deals that lead as far. No adjustment is made "
            "for the number of rows."
        )
    table = Table(
        ["sub-domain", "items", "best seed", "lead", "by chance", "p"],
        [
            [
                row["domain"],
                f"{row['items']:,}",
                row["best_seed"],
                _percent(row["lead"]),
                _percent(row["lead_by_chance"]),
                _number(row["p_value"]),
            ]
            for row in rows
        ],
    )
    return Section(f"Who is right where: {test['name']}", lines, [table] if several else [], pictures)


def _selection(found: Facts, picture: Callable[[str, str], list[Picture]]) -> list[Section]:
    """What the validation rows decided, and what they say of the outcome."""
    selection = found["selection"]
    if selection is None:
        return []
    by = {"loss": "the lowest loss", "match": "most exact matches"}[selection["by"]]
    lines = [
        f"{selection['rows']:,} rows, {selection['tokens']:,} tokens; best is {by}. No test item was looked at.",
        "Losses are in nats per token; match is the share of rows that greedy decoding answers exactly, in percent.",
    ]
    if (chosen := selection["chosen"]) is not None:
        tried = len(selection["candidates"])
        lines.append(
            f"Asked for {selection['asked']}; {chosen['name']} was chosen among {tried} rules, so its scores on these "
            "rows flatter it."
        )
    for label, row in selection["against"].items():
        judged = "no difference shown" if not row["shown"] else "lower" if row["value"] < 0 else "higher"
        name = f"{label}, the best seed of these rows" if label == selection["best_seed"] else label
        interval = f"{found['confidence_percent']} % interval {row['low']:+.4f} to {row['high']:+.4f}, rows resampled"
        lines.append(f"Loss of the fused adapter minus that of {name}: {row['value']:+.4f} ({interval}), {judged}.")
    rules = lambda rows: [[row["name"], f"{row['loss']:.4f}", _percent(row["match"])] for row in rows]  # noqa: E731
    scores = [[label, f"{row['loss']:.4f}", _percent(row["match"])] for label, row in selection["scores"].items()]
    tables = [Table(["adapter", "loss", "match"], scores)]
    controls = selection["controls"]
    if GAIN_SEED in controls:
        lines.append(f"{GAIN_SEED} is {controls[GAIN_SEED]['seed']}, the best seed of these rows.")
    if GREEDY in controls:
        members = ", ".join(found["trained"][i] for i in controls[GREEDY]["members"])
        lines.append(f"{GREEDY} is the soup of {members}.")
    if (best := controls.get(GAIN_SOUP, {}).get("name")) is not None:
        lines.append(f"{GAIN_SOUP} is {best}, the best of those in its table.")
    if selection["candidates"]:
        tables.append(Table(["rule", "loss", "match"], rules(selection["candidates"])))
    if (control := selection["controls"].get(GAIN_SOUP)) is not None:
        tables.append(Table([f"tried for {GAIN_SOUP}", "loss", "match"], rules(control["candidates"])))
    subsets = (
        Section(
            "How many seeds",
            [
                "Validation loss, in nats per token, of every subset of the seeds, or of some of each size where they "
                "are many."
            ],
            [
                Table(
                    ["seeds", *(f"{label}, loss" for label in selection["subsets"][0]["loss"])],
                    [
                        [", ".join(row["seeds"]), *(f"{loss:.4f}" for loss in row["loss"].values())]
                        for row in selection["subsets"]
                    ],
                )
            ],
            picture("subsets", "Validation loss by the number of seeds fused; lines join the means."),
        )
        if selection["subsets"]
        else Section("")
    )
    pictures = [
        *picture("gain-curve", "Validation loss over the gain on the mean update."),
        *picture("candidates", "Validation loss of the rules that were tried; what was chosen in the text's colour."),
    ]
    return [Section("On the validation rows", lines, tables, pictures), subsets]


def _equal_budget(found: Facts, picture: Callable[[str, str], list[Picture]]) -> Section:
    rows = found["adapters"]
    sample = found["train_sample"]
    over = "the training loss, mean of the last tenth of the steps"
    if sample is not None:
        over = f"the loss on {sample['rows']:,} training rows, the same for all; intervals of both"
    pictures = [
        *picture(
            "budget",
            "Score over the tokens that went into an adapter; soup and the fused one have those of all seeds. Those "
            "with the same tokens stand side by side.",
        ),
        *picture("loss-score", f"Score over {over}."),
    ]
    if not pictures:
        return Section("")
    header = ["adapter", "score", "loss on training rows", "loss of the last steps", "tokens"]
    cells = [
        [
            row["adapter"],
            _percent(row["value"]),
            _loss_interval(row["sample_loss"]),
            "" if row["train_loss"] is None else f"{row['train_loss']:.3f}",
            _count(row["tokens"]),
        ]
        for row in rows
    ]
    lines = [
        "Losses are in nats per token. That of the last steps is the mean over the last tenth of an adapter's "
        "training, each step on its own rows."
    ]
    if sample is None:
        header, cells = [*header[:2], *header[3:]], [[*row[:2], *row[3:]] for row in cells]
    else:
        lines.append(
            f"After the test all were scored on the same {sample['rows']:,} rows ({sample['tokens']:,} tokens), drawn "
            "from the training rows: some of them may be rows that an adapter did not get to. Intervals are of "
            f"{found['confidence_percent']} %, resampled over rows. All adapters share the rows, so a difference "
            "between two of them is surer than their intervals."
        )
    return Section("Cost, loss and score", lines, [Table(header, cells)], pictures)


def _scores(found: Facts, test: Facts, pictures: Sequence[Picture]) -> Section:
    percent = found["confidence_percent"]
    lines = [f"Scored: {test['metric']}; n = {test['n']:,}. Scores are in percent, with {percent} % Wilson intervals."]
    if test["seed_spread"] is not None:
        spread = f"standard deviation of the seeds {_percent(test['seed_spread'])} points"
        lines[0] += f" Mean seed {_percent(test['mean_seed'])}, {spread}."
    scored = {row["adapter"] for row in test["scores"]}
    scores = Table(
        ["adapter", "right", "score", "interval"],
        [
            [
                row["adapter"],
                f"{row['right']:,}",
                _percent(row["value"]),
                f"{_percent(row['low'])} to {_percent(row['high'])}",
            ]
            for row in test["scores"]
        ],
    )
    tables = [scores]
    if controls := [[label, meaning] for label, meaning in MEANING.items() if label in scored]:
        tables.append(Table(["control", "what it is"], controls, words=True))
    if test["comparisons"]:
        over_tasks = test["tasks"] > 1
        lines.append(
            "Differences are in points, paired by item, with bootstrap intervals; p is McNemar's exact test"
            + (f", Holm the same adjusted over the {test['tasks']} tasks" if over_tasks else "")
            + ", Holm (table) the same adjusted for all tests of this table. What is shown is said by the interval "
            "alone, without adjustment: of many rows, some would show a difference by chance. The mean seed is not "
            f"right or wrong on an item, so it has no such test. The best seed, {test['best_seed']}, was picked by "
            "this test set, which flatters it."
        )
        tables.append(
            Table(
                ["adapter", "against", "difference", "shown", "p", *(["Holm"] if over_tasks else []), "Holm (table)"],
                [
                    [
                        row["adapter"],
                        row["against"],
                        _interval(row),
                        "nothing" if not row["shown"] else "better" if row["value"] > 0 else "worse",
                        _number(row["p_value"]),
                        *([_number(row["p_value_holm"])] if over_tasks else []),
                        _number(row["p_value_holm_table"]),
                    ]
                    # The fused adapter first; the others as they were scored.
                    for row in sorted(test["comparisons"], key=lambda row: row["adapter"] != FUSED)
                ],
            )
        )
    if test["by_right_seeds"]:
        labels = list(test["by_right_seeds"][0]["right"])
        lines.append("The last table sorts the items by how many seeds get them right, and counts who else does.")
        tables.append(
            Table(
                ["seeds right", "items", *(f"{label} right" for label in labels)],
                [
                    [str(row["right_seeds"]), f"{row['items']:,}", *(f"{row['right'][label]:,}" for label in labels)]
                    for row in test["by_right_seeds"]
                ],
            )
        )
    return Section(f"Scores: {test['name']}", lines, tables, pictures)


def _training(found: Facts, picture: Callable[[str, str], list[Picture]]) -> Section:
    training = found["training"]
    stretch = training["steps_per_point"]
    averaged = "" if stretch == 1 else f" Each point is the mean of {stretch} steps."
    rows = [
        [label, f"{end['step']:,}", f"{end['last']:.4f}", f"{end['lowest']:.4f}"]
        for label, end in training["ends"].items()
    ]
    lines = ["Losses are in nats per token."] if training["train"] or rows else []
    if rows:
        lines[0] += " The table has the validation loss after the last step, and the lowest of the training."
    return Section(
        "Training",
        lines,
        tables=[Table(["adapter", "last step", "validation loss", "lowest"], rows)] if rows else [],
        pictures=[
            *picture("train", f"Training loss of each adapter on the rows of its step.{averaged}"),
            *picture("validation", "Validation loss of each adapter, and of the seeds fused as they were then."),
        ],
    )


def _weights(found: Facts, picture: Callable[[str, str], list[Picture]]) -> list[Section]:
    weights = found["weights"]
    if weights is None:
        return []
    seeds, several = found["trained"], len(found["trained"]) > 1
    merged = found["merged"]
    cosines = [[seed, *(f"{value:.3f}" for value in row)] for seed, row in zip(seeds, weights["cosines"], strict=False)]
    ranks = weights["spectra"]["effective_rank"]
    counted = weights["distributions"]
    header = ["module", "layers", "cosine", "gain", "effective rank", "fused"]
    modules = Table(
        header if merged else [name for name in header if name not in ("gain", "fused")],
        [
            [
                row["module"],
                str(row["layers"]),
                _number(row["mean_cosine"]),
                *([_number(row["applied_gain"])] if merged else []),
                _number(row["effective_rank"]),
                *([_number(row["merged_effective_rank"])] if merged else []),
            ]
            for row in weights["modules"]
        ],
    )
    return [
        Section(
            "How alike the seeds are",
            ["Cosines of the updates, each adapter taken as one vector; those of unrelated adapters are near zero."]
            if several
            else [],
            [Table(["cosine", *seeds], cosines)] if several else [],
            [
                *picture("pairs", "Cosine of every pair of seeds."),
                *picture("cosines", "Cosine in every layer, mean over the pairs of seeds."),
            ],
        ),
        Section(
            "Weights",
            [
                "Means over the layers of each module type. The effective rank is the exponential of the entropy of "
                "the singular values."
                + (" The gain is the norm of the fused update over that of the seeds' mean." if merged else ""),
                f"Below, each adapter's effective rank in {weights['spectra']['path']}, the layer in the middle, and "
                f"the standard deviation of its entries in {', '.join(counted['layers'])}.",
            ],
            [
                modules,
                Table(
                    ["adapter", "effective rank", "standard deviation"],
                    [
                        [label, _number(ranks.get(label)), _number(std)]
                        for label, std in weights["distributions"]["std"].items()
                    ],
                ),
            ],
            [
                *picture("spectra", f"Singular values in {weights['spectra']['path']}, the layer in the middle."),
                *picture(
                    "distributions", f"All {counted['entries']:,} entries of each update in the layers named above."
                ),
                *picture("gains", "Gain of the fusion in every layer."),
            ],
        ),
    ]


def _cost(found: Facts) -> Section:
    plan, rows = found["cost"], []
    if plan is not None:
        rows = [
            ["budget", plan["budget"]],
            ["steps of each seed", f"{plan['steps']:,}"],
            ["rows in a step of each seed", f"{plan['batch']:,}"],
            ["seeds", str(len(plan["seeds"]))],
            ["passes", str(plan["passes"])],
            ["parameters of the frozen base", f"{plan['base_parameters']:,}"],
        ]
    if (sample := found["train_sample"]) is not None:
        rows.append(["training rows scored after the test", f"{sample['rows']:,}"])
        rows.append(["by so many adapters", str(len(sample["losses"]))])
    phases = list(dict.fromkeys(phase for took in found["took"].values() for phase in took))
    took = [
        [label, *(f"{times[phase]:,.1f}" if phase in times else "" for phase in phases)]
        for label, times in found["took"].items()
    ]
    shares = [[row["what"], _known(row["all"]), _known(row["one"])] for row in found["shares"]]
    trained = [
        [label, f"{row['steps']:,}", _known(row.get("tokens")), _known(row.get("scored")), _count(row["kept_step"])]
        for label, row in found["trained_on"].items()
    ]
    header = ["adapter", "steps", "tokens seen", "of these scored", "step kept"]
    kept = any(row[-1] for row in trained)
    return Section(
        "Cost",
        tables=[
            *([Table(["what", "how much"], rows)] if rows else []),
            *([Table(["wall time, seconds", *phases], took)] if took else []),
            *([Table(["what", "all seeds", "one seed"], shares)] if shares else []),
            *(
                [Table(header if kept else header[:-1], trained if kept else [row[:-1] for row in trained])]
                if trained
                else []
            ),
        ],
    )


def _known(value: float | None) -> str:
    return "not known" if value is None else _amount(value)


def _reproduce(found: Facts) -> list[Section]:
    record = found["reproduce"]
    option = ", ".join(f"{key}={value}" for key, value in record["options"].items())
    lines = [] if found["method"] is None else [f"Merge method: {found['method']}{f' ({option})' if option else ''}."]
    versions, hashes, settings = record["versions"], record["sha256"], record["settings"]
    return [
        Section("How to reproduce", lines, code=record["command"]),
        Section(
            "Versions and hashes",
            tables=[
                *([Table(["library", "version"], list(versions.items()), words=True)] if versions else []),
                *(
                    [Table(["base model", "what tells it from another"], _base(record["base"]), words=True)]
                    if record["base"]
                    else []
                ),
                *([Table(["adapter", "sha256 of the weights"], list(hashes.items()), words=True)] if hashes else []),
            ],
        ),
        Section(
            "Settings",
            tables=[Table(["setting", "value"], [[k, json.dumps(v)] for k, v in settings.items()], words=True)],
        ),
    ]


def _base(record: Mapping[str, Any]) -> list[list[str]]:
    if "revision" in record:
        return [["commit on the hub", str(record["revision"])]]
    files = [[name, f"{size:,} bytes"] for name, size in record["bytes"].items()]
    return [["config.json", f"sha256 {record['config_sha256']}"], *files]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _amount(value: float | None) -> str:
    if value is None or isinstance(value, int):
        return _count(value)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _loss_interval(row: Mapping[str, Any] | None) -> str:
    return "" if row is None else f"{row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})"


def _interval(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{100 * row['value']:+.1f} ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})"
