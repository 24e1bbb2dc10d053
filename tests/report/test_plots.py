"""The figures of a report."""

from __future__ import annotations

import json
import re

import pytest
from matplotlib.figure import Figure

from seedlora.merge.registry import METHODS
from seedlora.names import MEANING, TRAINED_CONTROLS, ema_name
from seedlora.report.drawing import WIDTH, Palette, colour_range, draw_legend, own_style
from seedlora.report.figures import figures
from seedlora.report.page import write_report
from seedlora.report.plots import domains, run_differences
from tests.helpers.report_page import Page
from tests.helpers.report_runs import CONTROLS, SEEDS


def test_the_page_stands_alone_and_its_figures_share_colours(stored):
    text = (stored / "report.html").read_text()
    page = Page(text)
    inside = [link[1:] for link in page.links if link.startswith("#")]
    assert [link[:22] for link in page.links if link[0] != "#"] == ["data:image/png;base64,"] * 3
    assert len(page.ids) == len(set(page.ids))
    assert set(inside) <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(page.ids)
    found = json.loads((stored / "report.json").read_text())
    drawn = figures(found)
    weights = ["pairs", "cosines", "spectra", "distributions", "gains"]
    assert list(drawn) == ["front", "scores-0", "train", "validation", "loss-score", *weights]
    palette = Palette(SEEDS).colours
    assert len({palette[seed] for seed in SEEDS}) == 3
    for name in ("scores-0", "train", "validation", "loss-score", "spectra", "distributions"):
        assert all(palette[seed].lower() in drawn[name].lower() for seed in SEEDS)
    assert all("currentColor" in svg and "<text" in svg for svg in drawn.values())


def test_the_figures_of_a_comparison(compared):
    found = json.loads((compared / "report.json").read_text())
    drawn = figures(found)
    assert list(drawn)[:10] == [
        *(
            "front",
            "scores-0",
            "methods-0",
            "domains-0",
            "train",
            "validation",
            "budget",
            "loss-score",
            "gain-curve",
            "candidates",
        )
    ]
    assert "subsets" in drawn
    text = (compared / "report.md").read_text()
    for sentence in ("Asked for auto; ", "No test item was looked at.", "| logit_mean | the mean of the seeds'"):
        assert sentence in text
    cost = {row["adapter"]: row["tokens"] for row in found["adapters"]}
    assert cost["long_seed"] == cost["fused"] == 3 * cost["seed_11"] == 3 * cost["wide_seed"]
    phases = {"starting", "training", "validation", "fusing"}
    assert {label: set(took) for label, took in found["took"].items()} == dict.fromkeys(
        ("seeds", "long_seed", "wide_seed"), phases
    )
    shares = {row["what"]: (row["all"], row["one"]) for row in found["shares"]}
    plan = json.loads((compared / "cost.json").read_text())["plan"]
    estimates = tuple(sum(plan[key].values()) / 2**30 for key in ("memory", "memory_alone"))
    assert shares["tokens"] == (cost["fused"], cost["seed_11"])
    assert shares["memory of training, estimated, GiB"] == estimates
    assert estimates[0] > estimates[1] > estimates[0] / 3
    took = (found["took"][label]["training"] for label in ("seeds", "long_seed"))
    assert shares["training on the tokens of all, seconds"] == tuple(took)
    assert "its peak as measured" in text
    ends = found["training"]["train"]["seed_11"][-1:]
    assert {row["adapter"]: row["train_loss"] for row in found["adapters"]}["seed_11"] == ends[0][1]
    against = {row["against"] for row in found["tests"][0]["comparisons"] if row["adapter"] == "fused"}
    assert against == {"mean seed", "best seed", "soup", *CONTROLS}
    before = {name: (compared / name).read_bytes() for name in ("report.json", "report.md", "report.html")}
    write_report(compared)
    assert all((compared / name).read_bytes() == content for name, content in before.items())


def test_training_loss_against_score_is_of_one_sample_of_rows(compared):
    """Figures 3b and 3c: all dots mean the same, and every adapter but the base is one."""
    found = json.loads((compared / "report.json").read_text())
    sample = found["train_sample"]
    rows = {row["adapter"]: row for row in found["adapters"]}
    assert (
        rows.keys() == sample["losses"].keys() - {"base"} == {*SEEDS, "soup", "fused", *CONTROLS, "ties", "model_stock"}
    )
    assert all(row["sample_loss"] == sample["losses"][label] for label, row in rows.items())
    drawn = figures(found)["loss-score"]
    assert f">loss on {sample['rows']} training rows (nats per token)<" in drawn
    assert all(f">{label}<" in drawn for label in rows)
    assert ">base<" not in drawn
    text = (compared / "report.md").read_text()
    assert f"| training rows scored after the test | {sample['rows']} |" in text
    assert f"| by so many adapters | {len(rows) + 1} |" in text


def test_a_legend_is_as_wide_as_its_figure():
    """As a renderer measures it, with the longest names."""
    labels = ["seed_1234567890", *METHODS, *CONTROLS]
    palette = Palette(labels[:1])
    with own_style():
        figure = Figure(figsize=(WIDTH, 4), layout="constrained")
        axes = figure.add_subplot()
        for i, label in enumerate(labels):
            axes.errorbar([i], [i], yerr=1, xerr=1, label=label, color=palette.colour(label), marker="o")
        draw_legend(axes)
        figure.draw_without_rendering()
        (legend,) = figure.legends
        assert legend._ncols > 1
        assert legend.get_window_extent().width <= figure.bbox.width


def test_long_names_of_runs_leave_room_for_their_intervals(recwarn):
    difference = {"value": 0.1, "low": 0.0, "high": 0.2}
    runs = [{"run": name, "against_mean_seed": difference} for name in ("b" * 90, "a_run")]
    drawn = run_differences("runs", runs)
    assert f">{'b' * 14}…{'b' * 13}<" in drawn
    assert ">a_run<" in drawn
    assert not [warning for warning in recwarn if "constrained_layout" in str(warning.message)]


def test_sixteen_seeds_and_controls_can_be_told_apart():
    seeds = [f"seed_{i}" for i in range(16)]
    palette = Palette(seeds)
    drawn_as_lines = [*seeds, "soup", "base", "fused", *TRAINED_CONTROLS]
    assert len({(palette.colour(label), palette.line(label)) for label in drawn_as_lines}) == len(drawn_as_lines)
    # No two labels share a colour, whatever is compared; from the eighth seed on lines and markers differ too.
    labels = [*seeds, *map(ema_name, seeds), *METHODS, *MEANING, *TRAINED_CONTROLS, "soup", "base", "fused"]
    assert len({palette.colour(label) for label in labels}) == len(set(labels))
    assert len({(palette.colour(label), palette.marker(label)) for label in seeds}) == 16


def test_numbers_that_are_nearly_the_same_have_nearly_the_same_colour():
    low, high = colour_range([0.190, 0.193], 0.2)
    assert (low, high) == pytest.approx((0.0915, 0.2915))
    assert colour_range([0.0, 1.0, float("nan")], 0.2) == (0.0, 1.0)


def test_marks_show_their_values_under_the_pointer(stored):
    found = json.loads((stored / "report.json").read_text())
    texts = Page((stored / "report.html").read_text()).hovers
    row = next(row for row in found["tests"][0]["scores"] if row["adapter"] == "soup")
    ends = " to ".join(f"{100 * row[key]:.1f}" for key in ("low", "high"))
    assert f"soup: {100 * row['value']:.1f} ({ends})" in texts
    (step, loss), *_ = found["training"]["train"]["seed_11"]
    assert f"seed_11, step {step:.0f}: {loss:.4f}" in texts
    layer = found["weights"]["layers"][0]
    assert f"layer {layer['layer']}, {layer['module']}: {layer['mean_cosine']:.3f}" in texts


def test_many_sub_domains_stand_below_each_other():
    def drawn(count):
        rows = [{"domain": f"kind {i}", "winners": ["b"], "scores": {"a": i / 60, "b": 1.0}} for i in range(count)]
        text = domains("it", {"chance": None, "domains": rows, "scores": [{"adapter": "a"}, {"adapter": "b"}]})
        width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups())
        assert text.count("[100]") == count, "the best seed's are in brackets"
        assert all(f">{row['domain']}<" in text for row in rows)
        return width, height

    few, many = drawn(4), drawn(57)
    assert few[0] == many[0]
    assert many[1] > 4 * few[1]
