"""What a report must show, computed again from its report.json: each cell from its own fact."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")


class Page(HTMLParser):
    """The text of a page by where it stands."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.prose, self.code, self.ids, self.links, self.hovers, self.elements = [], [], [], [], [], []
        self.examples = []
        self.tables, self.pictures, self.inside = [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.elements.append((tag, attributes))
        if tag in ("meta", "br", "wbr"):
            return
        self.inside.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
        elif tag == "g" and "figure_1" in attributes.get("id", ""):
            self.pictures[attributes["id"].removesuffix("-figure_1")] = []

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag in self.inside:
            while self.inside.pop() != tag:
                pass

    def handle_data(self, data):
        data = data.replace("\xa0", " ")
        if "svg" in self.inside:
            if self.inside[-1] in ("text", "tspan"):
                self.pictures[list(self.pictures)[-1]].append(data)
            elif self.inside[-1] == "title":
                self.hovers.append(data)
        elif "table" in self.inside and "caption" not in self.inside:
            if {"th", "td"} & set(self.inside):
                self.tables[-1][-1][-1] += data
        elif "article" in self.inside:
            self.examples.append(data)
        elif "pre" in self.inside:
            self.code.append(data)
        elif not {"style", "script"} & set(self.inside):
            self.prose.append(data)


def markdown(text):
    """Tables and prose of Markdown."""
    tables, rows = [], []
    for line in text.splitlines():
        cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells and all(re.fullmatch("-+:?", cell) for cell in cells):
            rows = [rows.pop()]
            tables.append(rows)
        elif line.startswith("|"):
            rows.append(cells)
    return tables, [line for line in text.splitlines() if not line.startswith(("|", "    "))]


def check_page(found, tables, allowed, html, markdown_text, pictures):
    """Fail if a number of either page is not the fact that it should be."""
    page = Page(html)
    own_tables, own_prose = markdown(markdown_text)
    wanted = [[list(header), *map(list, rows)] for header, rows in tables]
    assert page.tables == wanted
    assert own_tables == wanted
    for name, texts in pictures.items():
        assert [text for text in page.pictures[name] if text.strip("[]-0123456789.") == ""][: len(texts)] == texts, name
    commands = [each["line"] for each in found.get("front", {}).get("commands", [])]
    if again := found.get("reproduce", {}).get("command"):
        commands.append(again)
    assert [text.strip() for text in page.code] == commands
    known = written(found)
    assert [number for text in page.hovers for number in NUMBER.findall(text) if number.rstrip(",") not in known] == []
    shown, lines = example_texts(found)
    assert {text.strip() for text in page.examples} <= shown
    own_prose = [line for line in own_prose if line not in lines]
    said = {key: value for key, value in found.items() if key != "examples"}
    sentences = sorted(strings(said), key=len, reverse=True)
    for text in (" ".join(page.prose), "\n".join(own_prose)):
        for sentence in sentences:
            if len(sentence) > 1:
                text = text.replace(sentence, " ")
        assert [number for number in NUMBER.findall(text) if number.rstrip(",") not in allowed] == []


def example_texts(found):
    """Return what the pages may say of the shown test items: pieces of HTML, and lines of Markdown."""
    shown, lines = {"", "expected", "right", "wrong", "✓", "✗"}, set()
    for row in (found.get("examples") or {"shown": []})["shown"]:
        texts = [row["prompt"], row["expected"], *(visible(answer["text"]) for answer in row["answers"])]
        labels = [answer["adapter"] for answer in row["answers"]]
        shown |= {text.replace("\xa0", " ").strip() for text in texts} | {*labels, *(f"{label}," for label in labels)}
        lines |= {f"Test item {row['item']}", f"- expected: {' '.join(row['expected'].split())}"}
        for answer in row["answers"]:
            same = [each["adapter"] for each in row["answers"] if each["text"] == answer["text"]]
            word = "right" if answer["right"] else "wrong"
            lines.add(f"- {', '.join(same)}, {word}: {' '.join(visible(answer['text']).split())}")
    return shown, lines


def visible(text):
    """An answer as it is shown."""
    stripped = text.lstrip("\n")
    return "↵" * (len(text) - len(stripped)) + re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\ufffd", stripped) or "(nothing)"


def written(value):
    """All numbers of a record, in the forms that figures show under the pointer; of a list the places too."""
    if isinstance(value, dict):
        keys = {text for key in value for text in NUMBER.findall(key)}
        return keys.union(*(written(each) for each in value.values()))
    if isinstance(value, list):
        return {str(i + 1) for i in range(len(value))}.union(*(written(each) for each in value))
    if isinstance(value, str):
        return set(NUMBER.findall(value))
    if value is None or isinstance(value, bool):
        return set()
    forms = (format(100 * value, ".1f"), *(format(value, form) for form in (".4f", ".3f", ".3g", ",.0f", "g")))
    return {form.lstrip("-") for form in forms}


def strings(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return {text for item in value for text in strings(item)}
    return {value} if isinstance(value, str) else set()


# Cells


def share(value):
    return "" if value is None else format(100 * value, ".1f")


def points(row):
    return f"{100 * row['value']:+.1f} ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})" if row else ""


def nats_only(value):
    return "" if value is None else format(value, ".3f")


def nats(row):
    return f"{row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})"


def short(value):
    return "" if value is None else format(value, ".3g")


def known(value):
    if value is None:
        return "not known"
    return f"{value:,}" if isinstance(value, int) else format(value, ",.0f" if value >= 100 else ".3g")


def count(value):
    return "" if value is None else f"{value:,}"


def run_tables(found, meaning):
    """All tables of a run's page in their order, as (header, rows)."""
    tables = []
    add = lambda header, rows: tables.append((header.split("|") if isinstance(header, str) else header, rows))  # noqa: E731
    if sweep := found["sweep"]:
        seeds = list(sweep["rows"][0]["losses"])
        losses = lambda r: [format(loss, ".4f") for loss in (*r["losses"].values(), r["mean"])]  # noqa: E731
        values = lambda r: [f"{v:g}" for v in r["values"].values()]  # noqa: E731
        add([*sweep["options"], *seeds, "mean"], [[*values(r), *losses(r)] for r in sweep["rows"]])
    for test in found["tests"]:
        scores = test["scores"]
        rows = [[r["adapter"], str(r["right"]), share(r["value"])] for r in scores]
        spans = [f"{share(r['low'])} to {share(r['high'])}" for r in scores]
        add("adapter|right|score|interval", [[*row, span] for row, span in zip(rows, spans, strict=True)])
        if controls := [[k, v] for k, v in meaning.items() if k in [r["adapter"] for r in scores]]:
            add("control|what it is", controls)
        over_tasks = ["p_value_holm"] if test["tasks"] > 1 else []
        compared = sorted(test["comparisons"], key=lambda r: r["adapter"] != "fused")
        add(
            ["adapter", "against", "difference", "shown", "p", *(["Holm"] if over_tasks else []), "Holm (table)"],
            [
                [
                    *(r["adapter"], r["against"], points(r)),
                    "nothing" if r["low"] <= 0 <= r["high"] else "better" if r["low"] > 0 else "worse",
                    *(short(r[key]) for key in ("p_value", *over_tasks, "p_value_holm_table")),
                ]
                for r in compared
            ],
        )
        if rows := test["by_right_seeds"]:
            labels = list(rows[0]["right"])
            add(
                ["seeds right", "items", *(f"{label} right" for label in labels)],
                [[str(r["right_seeds"]), str(r["items"]), *(str(r["right"][label]) for label in labels)] for r in rows],
            )
        if rows := test["domains"]:
            cells = lambda r: [share(r["lead"]), share(r["lead_by_chance"]), short(r["p_value"])]  # noqa: E731
            add(
                "sub-domain|items|best seed|lead|by chance|p",
                [[r["domain"], str(r["items"]), r["best_seed"], *cells(r)] for r in rows],
            )
    if selection := found["selection"]:
        both = lambda r: [format(r["loss"], ".4f"), share(r["match"])]  # noqa: E731
        add("adapter|loss|match", [[label, *both(r)] for label, r in selection["scores"].items()])
        if rows := selection["candidates"]:
            add("rule|loss|match", [[r["name"], *both(r)] for r in rows])
        if tuned := selection["controls"].get("gain_soup"):
            add("tried for gain_soup|loss|match", [[r["name"], *both(r)] for r in tuned["candidates"]])
        if rows := selection["subsets"]:
            add(
                ["seeds", *(f"{label}, loss" for label in rows[0]["loss"])],
                [[", ".join(r["seeds"]), *(format(loss, ".4f") for loss in r["loss"].values())] for r in rows],
            )
    sampled = {label: nats(row) for label, row in found["train_sample"]["losses"].items()}
    adapters = [
        [r["adapter"], share(r["value"]), sampled[r["adapter"]], nats_only(r["train_loss"]), count(r["tokens"])]
        for r in found["adapters"]
    ]
    add("adapter|score|loss on training rows|loss of the last steps|tokens", adapters)
    ends = found["training"]["ends"].items()
    rows = [[k, str(e["step"]), format(e["last"], ".4f"), format(e["lowest"], ".4f")] for k, e in ends]
    add("adapter|after step|validation loss|lowest", rows)
    weights = found["weights"]
    rows = zip(found["trained"], weights["cosines"], strict=True)
    add(["cosine", *found["trained"]], [[seed, *(format(v, ".3f") for v in row)] for seed, row in rows])
    keys = ("mean_cosine", "applied_gain", "effective_rank", "merged_effective_rank")
    add(
        "module|layers|cosine|gain|effective rank|fused",
        [[r["module"], str(r["layers"]), *(short(r[key]) for key in keys)] for r in weights["modules"]],
    )
    ranks = weights["spectra"]["effective_rank"]
    std = weights["distributions"]["std"]
    add("adapter|effective rank|standard deviation", [[k, short(ranks.get(k)), short(v)] for k, v in std.items()])
    plan, trained = found["cost"], ["replicas" if found["sweep"] else "seeds", str(len(found["seeds"]))]
    rows = [["budget", plan["budget"]], ["steps of each seed", str(plan["steps"])]]
    rows += [
        ["rows in a step of each seed", str(plan["batch"])],
        trained,
    ]
    rows += [["passes", str(plan["passes"])], ["parameters of the frozen base", f"{plan['base_parameters']:,}"]]
    sample = found["train_sample"]
    rows += [["training rows scored after the test", str(sample["rows"])]]
    rows += [["by so many adapters", str(len(sample["losses"]))]]
    add("what|how much", rows)
    phases = ["starting", "training", "validation", "fusing"]
    took = found["took"].items()
    add(["wall time, seconds", *phases], [[k, *(format(v[phase], ",.1f") for phase in phases)] for k, v in took])
    add("what|all seeds|one seed", [[r["what"], known(r["all"]), known(r["one"])] for r in found["shares"]])
    rows = [[k, str(r["steps"]), known(r["tokens"]), known(r["scored"])] for k, r in found["trained_on"].items()]
    add("adapter|steps|tokens seen|of these scored", rows)
    record = found["reproduce"]
    add("library|version", [list(pair) for pair in record["versions"].items()])
    sizes = [[name, f"{size:,} bytes"] for name, size in record["base"]["bytes"].items()]
    config = ["config.json", f"sha256 {record['base']['config_sha256']}"]
    add("base model|what tells it from another", [config, *sizes])
    add("adapter|sha256 of the weights", [list(pair) for pair in record["sha256"].items()])
    add("setting|value", [[key, json.dumps(value)] for key, value in record["settings"].items()])
    return tables


def run_numbers(found):
    """What the sentences of a run's page may say beside those that are in report.json as they are."""
    allowed = {str(found["confidence_percent"]), str(found["training"]["steps_per_point"])}
    allowed |= {count(found["train_sample"]["rows"]), count(found["train_sample"]["tokens"])}
    for test in found["tests"]:
        allowed |= {
            count(test["n"]),
            str(test["tasks"]),
            *(share(test[k]) for k in ("mean_seed", "seed_spread", "chance")),
        }
    if selection := found["selection"]:
        allowed |= {count(selection["rows"]), count(selection["tokens"]), str(len(selection["candidates"]))}
        rows = selection["against"].values()
        allowed |= {format(abs(row[key]), ".4f") for row in rows for key in ("value", "low", "high")}
    return allowed | front_numbers(found) | {f"{found['weights']['distributions']['entries']:,}"}


def front_numbers(found):
    """Return what the first screen says, and the line about the test items that are shown."""
    front, plan, examples = found["front"], found["cost"], found["examples"]
    scores = [front[key]["value"] for key in ("before", "after") if front[key]]
    minutes = divmod(round(front["seconds"]), 60)
    alike = examples["tested"] - examples["apart"] - examples["base_apart"]
    return {
        *(share(score) for score in scores),
        *map(str, plan["seeds"]),
        *map(count, (len(plan["replicas"]), plan["rows"], plan["steps"], front["tokens"])),
        *map(count, (examples["tested"], examples["apart"], examples["base_apart"], alike, len(examples["shown"]))),
        *map(str, minutes),
        format(front["peak_gib"], ".2f"),
        # beside the titles of sections
        *(format(end["last"], ".4f") for end in found["training"]["ends"].values()),
    }


def heat_maps(found):
    """What is written into the cells of the heat maps."""
    drawn = {"pairs": [f"{value:.2f}" for row in found["weights"]["cosines"] for value in row]}
    for i, test in enumerate(found["tests"]):
        if test["domains"]:
            most = {row["domain"]: max(row["scores"].values()) for row in test["domains"]}
            cells = [
                (100 * row["scores"][score["adapter"]], row["scores"][score["adapter"]] == most[row["domain"]] > 0)
                for score in test["scores"]
                for row in test["domains"]
            ]
            drawn[f"domains-{i}"] = [f"[{value:.0f}]" if best else f"{value:.0f}" for value, best in cells]
    return drawn


def comparison_tables(found):
    """The tables of the page about several runs."""
    value = lambda score: share(score and score["value"])  # noqa: E731
    checksums = [name for name in found["differing"] if name.startswith("sha256")]
    settings = [name for name in found["differing"] if name not in checksums]
    runs = [
        [
            *(row["run"], row["method"] or "", *(row["settings"][name] for name in settings)),
            *(value(row["fused"]), points(row["against_mean_seed"])),
            *(share(row["mean_seed"]), share(row["seed_spread"]), value(row["soup"]), value(row["base"])),
            *(count(row["n"]), row["use"], str(row["seeds"]), short(row["mean_cosine"]), count(row["tokens"])),
            *(f"{row['seconds']:.0f} s", *(row["settings"][name] for name in checksums)),
        ]
        for row in found["runs"]
    ]
    scores = ["fused", "against mean seed", "mean seed", "spread", "soup", "base", "n", "use", "seeds", "cosine"]
    tables = [(["run", "method", *settings, *scores, "tokens", "time", *checksums], runs)]
    if found["paired"]:
        header = ["fused adapter of", "against that of", "difference", "p", "Holm (table)"]
        keys = ("p_value", "p_value_holm_table")
        rows = [[r["run"], r["against"], points(r), *(short(r[key]) for key in keys)] for r in found["paired"]]
        tables.append((header, rows))
    return tables
