"""The report of a run: its numbers against independent ones, its bytes, and what it says when something is missing."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from matplotlib.figure import Figure
from rich.console import Console
from scipy import stats

from seedlora.adapters import adapter as adapter_file
from seedlora.adapters.adapter import adapter_sha256
from seedlora.cli import main as shell
from seedlora.cli import train as cli
from seedlora.datamodules import ReasoningGym, prompts
from seedlora.merge import record
from seedlora.merge.inputs import read_adapters
from seedlora.merge.registry import METHODS
from seedlora.names import MEANING
from seedlora.report.drawing import WIDTH, Palette, draw_legend, own_style
from seedlora.report.facts import facts
from seedlora.report.figures import figures
from seedlora.report.outcomes import describe_test
from seedlora.report.page import write_report
from seedlora.report.plots import domains, run_differences
from seedlora.report.training_curves import POINTS
from seedlora.scores.results import results as score
from tests.cli.test_train import SMALL
from tests.helpers.report_page import Page, check_page, comparison_tables, heat_maps, run_numbers, run_tables
from train import PARTS

SEEDS = ["seed_11", "seed_42", "seed_202"]


def train(folder: Path, base_model: str, *options: str) -> int:
    base = ["--model.base_model", base_model, "--model.dtype", "float32", *SMALL]
    return cli.main(PARTS, [*base, "--ensemble.dirpath", str(folder), *options])


@pytest.fixture(scope="module")
def stored(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a_run"
    assert train(folder, tiny_llama) == 0
    # The tiny model gets nothing right: outcomes as a better one would have them.
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps(with_items(results, items(120))))
    write_report(folder)
    return folder


CONTROLS = ["long_seed", "wide_seed", "logit_mean", "gain_seed", "gain_soup", "greedy_soup"]


@pytest.fixture(scope="module")
def compared(tiny_llama, tmp_path_factory):
    """A run with everything: a method chosen, others beside it, all controls, sub-domains."""
    folder = tmp_path_factory.mktemp("runs") / "compared"
    options = ["--merge", "auto", "--compare", "ties,model_stock", "--controls"]
    assert train(folder, tiny_llama, *options, "--data.task_options", '{"min_terms": 2, "max_terms": 4}') == 0
    results = json.loads((folder / "results.json").read_text())
    outcomes = items(120)
    for i, label in enumerate([*CONTROLS, "ties", "model_stock"]):
        outcomes[label] = outcomes["soup"][i + 1 :] + outcomes["soup"][: i + 1]
    terms = [str(2 + i % 3) for i in range(120)]
    (folder / "results.json").write_text(json.dumps(with_items(results, outcomes) | {"domains": {"num_terms": terms}}))
    write_report(folder)
    return folder


@pytest.fixture
def run(stored, tmp_path):
    """A copy to take things away from."""
    return shutil.copytree(stored, tmp_path / "a_run")


def items(n: int) -> dict[str, str]:
    rng = np.random.default_rng(3)
    easy = rng.random(n)
    shares = {"base": 0.1, "seed_11": 0.5, "seed_42": 0.55, "seed_202": 0.45, "soup": 0.55, "fused": 0.75}
    return {label: "".join("01"[int(e + 0.2 * rng.random() < share)] for e in easy) for label, share in shares.items()}


def with_items(stored: dict, outcomes: dict[str, str]) -> dict:
    """A test set as a run stores it, with other outcomes and what follows from them."""
    right = np.array([[digit == "1" for digit in digits] for digits in outcomes.values()]).T
    seeds = [label for label in outcomes if label.startswith("seed_")]
    return stored | score(right, list(outcomes), seeds, metric="it").to_record()


def test_comparisons_against_scipy():
    outcomes = items(300)
    found = describe_test("t", {"items": outcomes, "metric": "m"}, SEEDS)
    assert found == describe_test("t", with_items({}, outcomes) | {"metric": "m"}, SEEDS), "computed, or as stored"
    right = {label: np.array([int(digit) for digit in digits]) for label, digits in outcomes.items()}
    for row in found["scores"]:
        interval = stats.binomtest(int(right[row["adapter"]].sum()), 300).proportion_ci(method="wilson")
        assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high))
    best = max(SEEDS, key=lambda seed: right[seed].sum())
    assert found["best_seed"] == best
    references = {"mean seed": sum(right[s] for s in SEEDS) / 3, "best seed": right[best], "soup": right["soup"]}
    assert [(row["adapter"], row["against"]) for row in found["comparisons"]] == [
        ("soup", "mean seed"),
        ("soup", "best seed"),
        ("fused", "mean seed"),
        ("fused", "best seed"),
        ("fused", "soup"),
    ]
    wanted = []
    for row in found["comparisons"]:
        a, b = right[row["adapter"]], references[row["against"]]
        interval = stats.bootstrap((a - b,), np.mean, method="percentile", rng=0).confidence_interval
        assert row["value"] == pytest.approx((a - b).mean())
        assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high), abs=0.006)
        if row["against"] == "mean seed":
            assert row["p_value"] is None
            continue
        table = [int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())]
        assert row["p_value"] == pytest.approx(stats.binomtest(table[0], sum(table)).pvalue)
        wanted.append(row["p_value"])
    # Holm's rule for three tests, spelled out.
    order = np.argsort(wanted)
    first = min(1, 3 * wanted[order[0]])
    second = max(first, min(1, 2 * wanted[order[1]]))
    third = max(second, wanted[order[2]])
    adjusted = [row["p_value_holm_table"] for row in found["comparisons"] if row["p_value"] is not None]
    assert [adjusted[i] for i in order] == pytest.approx([first, second, third])
    counts = sum(right[seed] for seed in SEEDS)
    for row in found["by_right_seeds"]:
        where = counts == row["right_seeds"]
        assert (row["items"], row["right"]["fused"]) == (where.sum(), right["fused"][where].sum())


def outcomes(**only: tuple[int, int]) -> dict[str, str]:
    """Items that seeds and soup get right, then those that only the fused adapter does, and only soup."""
    ((fused, soup),) = only.values()
    return {
        "seed_11": "1" * (20 + fused + soup),
        "seed_42": "1" * 20 + "0" * (fused + soup),
        "soup": "1" * 20 + "0" * fused + "1" * soup,
        "fused": "1" * 20 + "1" * fused + "0" * soup,
    }


def test_holm_is_over_tasks_and_the_same_in_report_and_evaluation(run, tiny_llama):
    """By hand: 9 against 1 items have p = 2 (1 + 10) / 2^10, 5 against 0 have p = 2 / 2^5."""
    (run / "evaluation").mkdir()
    asked = {"n": 30, "prefix": "", "stops": [], "max_new_tokens": 9, "protocol_max_new_tokens": 9}
    tasks = {name: with_items(asked, outcomes(n=n)) for name, n in {"one": (9, 1), "two": (5, 0)}.items()}
    found = {"protocol": "paper", "prompt_styles": {}, "tasks": tasks}
    (run / "evaluation" / "results.json").write_text(json.dumps(found))
    own, one, two = (
        {(row["adapter"], row["against"]): row for row in test["comparisons"]} for test in facts(run)["tests"]
    )
    pair = "fused", "soup"
    assert (one[pair]["p_value"], two[pair]["p_value"]) == pytest.approx((22 / 1024, 1 / 16))
    assert (one[pair]["p_value_holm"], two[pair]["p_value_holm"]) == pytest.approx((44 / 1024, 1 / 16))
    # The run's own test set is scored by another protocol: one task.
    assert own[pair]["p_value_holm"] == own[pair]["p_value"]
    assert own[pair]["p_value_holm_table"] >= own[pair]["p_value"]
    assert one["fused", "mean seed"]["p_value_holm"] is None


def test_weights_against_the_dense_updates(stored):
    found = json.loads((stored / "report.json").read_text())["weights"]
    adapters = [adapter.layers for adapter in read_adapters([stored / name for name in (*SEEDS, "fused")]).values()]
    paths = list(adapters[0])
    dense = [{path: layers[path].dense()[0].double() for path in paths} for layers in adapters]
    long = torch.stack([torch.cat([update[path].flatten() for path in paths]) for update in dense[:3]])
    unit = long / long.norm(dim=1, keepdim=True)
    assert np.array(found["cosines"]) == pytest.approx((unit @ unit.T).numpy(), abs=1e-5)
    rows = {row["path"]: row for row in found["layers"]}
    assert set(rows) == set(paths)
    assert rows["model.layers.1.mlp.up_proj"]["layer"] == 1
    for path in paths:
        mean = (dense[0][path] + dense[1][path] + dense[2][path]) / 3
        assert rows[path]["applied_gain"] == pytest.approx(float(dense[3][path].norm() / mean.norm()), rel=1e-4)
    values = torch.linalg.svdvals(dense[1][found["spectra"]["path"]])[:8]
    assert found["spectra"]["singular_values"]["seed_42"] == pytest.approx(values.tolist(), rel=1e-4)
    drawn = found["distributions"]
    assert list(drawn["density"]) == [*SEEDS, "soup", "fused"]
    assert drawn["layers"] == [f"model.layers.1.self_attn.{name}_proj" for name in "koqv"]
    width = drawn["edges"][1] - drawn["edges"][0]
    soup = {path: sum(update[path] for update in dense[:3]) / 3 for path in paths}
    for label, updates in zip(drawn["density"], (*dense[:3], soup, dense[3]), strict=True):
        entries = torch.cat([updates[path].flatten() for path in drawn["layers"]]).numpy()
        assert drawn["entries"] == len(entries)
        assert drawn["std"][label] == pytest.approx(entries.std(), rel=1e-4)
        counts = np.histogram(entries, drawn["edges"])[0]
        # An entry within rounding of an edge may be on its other side.
        assert np.abs(np.array(drawn["density"][label]) * width * len(entries) - counts).sum() <= 6


def test_the_same_run_gives_the_same_bytes(stored, run):
    write_report(run)
    for name in ("report.json", "report.md", "report.html"):
        assert (run / name).read_bytes() == (stored / name).read_bytes()


def check(folder: Path, html: str | None = None, text: str | None = None) -> None:
    found = json.loads((folder / "report.json").read_text())
    html = html or (folder / "report.html").read_text()
    text = text or (folder / "report.md").read_text()
    if "tests" in found:
        tables, allowed, cells = run_tables(found, MEANING), run_numbers(found), heat_maps(found)
    else:
        tables, cells = comparison_tables(found), {}
        allowed = {str(len(found["runs"])), str(found["confidence_percent"])}
    check_page(found, tables, allowed, html, text, cells)


@pytest.mark.parametrize("which", ["stored", "compared"])
def test_every_number_is_in_report_json(which, request):
    check(request.getfixturevalue(which))


def test_a_number_that_is_not_in_report_json_is_found(compared):
    html, text = (compared / "report.html").read_text(), (compared / "report.md").read_text()
    found = json.loads((compared / "report.json").read_text())
    lead = f"<td>{100 * found['tests'][0]['domains'][0]['lead']:.1f}</td>"
    seed = found["tests"][0]["scores"][1]["right"]
    (best, *_) = re.findall(r">\[\d+\]</text>", html)
    for place, other in (
        (lead, lead.replace("<td>", "<td>1")),
        (f"<td>{seed}</td>", f"<td>{seed + 1}</td>"),
        ("Mean seed ", "Mean seed 12.3, "),
        ("paired by item,", "paired by item 7,"),
        ("<pre>python train.py", "<pre>python train.py --model.r 4"),
        (best, ">[7]</text>"),  # in the heat map
    ):
        assert place in html, place
        with pytest.raises(AssertionError):
            check(compared, html=html.replace(place, other, 1))
    for place, other in ((f"| {seed} |", f"| {seed + 1} |"), ("Mean seed ", "Mean seed 12.3, ")):
        assert place in text, place
        with pytest.raises(AssertionError):
            check(compared, text=text.replace(place, other, 1))


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
    assert list(drawn) == ["scores-0", "train", "validation", "loss-score", *weights]
    palette = Palette(SEEDS).colours
    assert len({palette[seed] for seed in SEEDS}) == 3
    for name in ("scores-0", "train", "validation", "loss-score", "spectra", "distributions"):
        assert all(palette[seed].lower() in drawn[name].lower() for seed in SEEDS)
    assert all("currentColor" in svg and "<text" in svg for svg in drawn.values())


def test_the_figures_of_a_comparison(compared):
    found = json.loads((compared / "report.json").read_text())
    drawn = figures(found)
    assert list(drawn)[:9] == [
        *(
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
    assert {label: set(took) for label, took in found["took"].items()} == {
        "seeds": phases,
        "long_seed": phases,
        "wide_seed": phases,
    }
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


def test_sub_domains_and_the_lead_that_chance_gives(compared):
    rows = json.loads((compared / "report.json").read_text())["tests"][0]["domains"]
    assert [row["domain"] for row in rows] == [f"num_terms {n}" for n in (2, 3, 4)]
    right = {label: np.array([int(d) for d in digits])[::3] for label, digits in items(120).items()}
    shares = [right[seed].mean() for seed in SEEDS]
    assert rows[0]["scores"]["fused"] == pytest.approx(right["fused"].mean())
    assert rows[0]["lead"] == pytest.approx(max(shares) - np.mean(shares))
    # Two seeds, one right on each of two items: dealt anew, one has both in half of the deals.
    two = {"items": {"seed_11": "10", "seed_42": "01"}, "domains": {"kind": ["a", "a"]}}
    (row,) = describe_test("t", two, SEEDS)["domains"]
    assert row["lead"] == 0
    assert row["lead_by_chance"] == pytest.approx(0.25, abs=0.03)
    assert row["p_value"] == 1


def test_the_verdict_is_the_comparison_with_its_interval(stored):
    found = json.loads((stored / "report.json").read_text())
    row = next(r for r in found["tests"][0]["comparisons"] if (r["adapter"], r["against"]) == ("fused", "mean seed"))
    assert found["verdict"].startswith("The fused adapter (seedlora): better than the mean seed, ")
    soup = next(r for r in found["tests"][0]["comparisons"] if (r["adapter"], r["against"]) == ("fused", "soup"))
    for half in (row, soup):
        interval = f"{100 * half['low']:+.1f} to {100 * half['high']:+.1f}"
        assert f"{100 * half['value']:+.1f} points (95 % interval {interval})" in found["verdict"]
    assert found["verdict"].endswith("(n = 120).")
    assert [sentence[:30] for sentence in found["missing"]] == ["No seed was trained alone, so "]
    assert "| training on the tokens of all, seconds | " in (text := (stored / "report.md").read_text())
    assert re.search(r"training on the tokens of all, seconds \| [\d.]+ \| not known \|", text)
    assert [sentence.rpartition(": ")[2] for sentence in found["more"]] == [
        "--compare ties,knots_ties.",
        "--controls.",
        "--controls untrained, with validation rows.",
    ]
    assert found["reproduce"]["versions"].keys() >= {"python", "torch", "reasoning-gym"}
    assert found["cost"]["steps"] == 4


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


def test_a_run_from_before_has_the_losses_of_its_last_steps(run):
    results = json.loads((run / "results.json").read_text())
    del results["train_sample"]
    (run / "results.json").write_text(json.dumps(results))
    text, found = said(run), facts(run)
    assert "No training rows were scored beside the test" in text
    assert "| adapter | score | loss of the last steps | tokens |" in text
    drawn = figures(found)["loss-score"]
    assert ">training loss at the end (nats per token)<" in drawn
    assert ">fused<" not in drawn


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


def test_the_fused_adapter_names_the_layers_it_was_made_of(run):
    record = json.loads((run / "fused" / "fusion.json").read_text())
    assert "Merge method: seedlora.\n" in (run / "report.md").read_text()
    record["use"] |= {"layers": "ffn", "rest": "soup"}
    (run / "fused" / "fusion.json").write_text(json.dumps(record))
    assert "Merge method: seedlora (layers=ffn, rest=soup).\n" in said(run)


def test_without_a_test_the_verdict_is_of_validation(run):
    (run / "results.json").unlink()
    found = facts(run)
    row = found["selection"]["against"]["soup"]
    assert found["verdict"].startswith(
        "The fused adapter (seedlora) was not tested. Its loss on the 4 validation rows: "
    )
    assert f"{row['value']:+.4f} (95 % interval {row['low']:+.4f} to {row['high']:+.4f})" in found["verdict"]
    selection = json.loads((run / "selection.json").read_text())
    selection["against"] = {"soup": {"value": 0.2, "low": 0.1, "high": 0.3, "n": 4, "shown": True}}
    selection["chosen"] = {"name": "ties", "method": "ties", "options": {}}
    (run / "selection.json").write_text(json.dumps(selection))
    wanted = "which flatters it: higher than soup's, +0.2000 (95 % interval +0.1000 to +0.3000)."
    assert facts(run)["verdict"].endswith(f"rows, on which it was chosen, {wanted}")


def test_a_run_whose_fused_adapter_loses_says_so_and_names_the_better_one(run, capsys):
    results = json.loads((run / "results.json").read_text())
    outcomes = results["items"] | {"fused": results["items"]["soup"], "soup": results["items"]["fused"]}
    (run / "results.json").write_text(json.dumps(with_items(results, outcomes)))
    selection = json.loads((run / "selection.json").read_text())
    (run / "selection.json").write_text(json.dumps(selection | {"against": {}}))
    this = SimpleNamespace(dirpath=run), SimpleNamespace(fast_dev_run=False, is_global_zero=True)
    cli._report(SimpleNamespace(ensemble=this[0], trainer=this[1]), Console(width=500))
    shown = capsys.readouterr().out
    assert "The fused adapter (seedlora) is worse than soup: it gets 16.7 points less of the test items (" in shown
    assert f"The better adapter is in {run / 'soup'}\n" in shown
    assert "The better adapter is in soup, beside fused." in (run / "report.md").read_text()


def test_what_was_left_out_is_said(run):
    trained = json.loads((run / "trained.json").read_text())
    assert trained["seed_42"]["steps"] == 4
    trained["seed_42"] |= {"steps": 3, "tokens": 700, "stopped": True}
    trained["seed_11"]["kept_step"] = 2
    (run / "trained.json").write_text(json.dumps(trained))
    cost = json.loads((run / "cost.json").read_text())
    cost["plan"]["left_out"] = ["5 too long left out"]
    (run / "cost.json").write_text(json.dumps(cost))
    selection = json.loads((run / "selection.json").read_text())
    selection |= {
        "not_finite": ["ties"],
        "controls": {"greedy_soup": {"members": [0, 2]}, "gain_seed": {"seed": "seed_202"}},
    }
    (run / "selection.json").write_text(json.dumps(selection))
    text = said(run)
    for sentence in (
        "- Of the rows of the data: 5 too long left out.",
        "- seed_42 was stopped after step 3: its validation loss improved no more.",
        "- Of seed_11 the weights of step 2 were kept, its best validation.",
        "- Without a finite validation loss, and so not chosen: ties.",
        "- The greedy soup is of seed_11, seed_202; seed_42 would harm.",
        "gain_seed is seed_202, the best seed of these rows.",
        f"| tokens | {trained['seed_11']['tokens'] + trained['seed_202']['tokens'] + 700:,} |",
        "| seed_42 | 3 | 700 |",
    ):
        assert sentence in text, sentence


def test_chance_and_all_winners_in_the_heat_map_of_mmlu(run, tmp_path):
    """From a file of MMLU's form through evaluate into the report."""
    rows = [
        {"question": f"{i}?", "choices": ["a", "b", "c", "d"], "answer": i % 4, "subject": "law" if i < 3 else "art"}
        for i in range(5)
    ]
    (tmp_path / "mmlu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapters = [word for name in (*SEEDS, "soup", "fused") for word in ("--adapter", str(run / name))]
    task = ["--task", "mmlu", "--task-path", f"mmlu={tmp_path / 'mmlu.jsonl'}", "--out", str(run / "evaluation")]
    assert shell.main(["evaluate", *adapters, *task, "--dtype", "float32"], prompts=prompts) == 0
    results = json.loads((run / "evaluation" / "results.json").read_text())
    assert len(results["tasks"]["mmlu"]["items_sha256"]) == 64
    right = {"seed_11": "11000", "seed_42": "00000", "seed_202": "01100", "soup": "00001", "fused": "00001"}
    results["tasks"]["mmlu"] = with_items(results["tasks"]["mmlu"], right)
    (run / "evaluation" / "results.json").write_text(json.dumps(results))
    write_report(run)
    check(run)
    found = json.loads((run / "report.json").read_text())
    test = found["tests"][1]
    assert (test["name"], test["chance"]) == ("mmlu", 0.25)
    assert [(row["domain"], row["winners"]) for row in test["domains"]] == [
        ("sub-domain art", ["soup", "fused"]),
        ("sub-domain law", ["seed_11", "seed_202"]),
    ]
    drawn = figures(found)["domains-1"]
    assert "line: chance, 25" in drawn
    assert (drawn.count("[50]"), drawn.count("[67]"), drawn.count("[")) == (2, 2, 4)


def test_sixteen_seeds_and_controls_can_be_told_apart():
    seeds = [f"seed_{i}" for i in range(16)]
    palette = Palette(seeds)
    drawn_as_lines = [*seeds, "soup", "base", "fused", "long_seed", "wide_seed"]
    assert len({(palette.colour(label), palette.line(label)) for label in drawn_as_lines}) == len(drawn_as_lines)
    # Whatever is compared, in a figure of dots: the fused adapter and soup are the text's colour and grey.
    others = {*METHODS, *CONTROLS} - {"soup"}
    assert len({(palette.colour(label), palette.marker(label)) for label in {*seeds, *others}}) == 16 + len(others)
    assert len({(palette.colour(label), palette.marker(label)) for label in seeds}) == 16
    assert len({palette.colour(label) for label in ("seed_0", "long_seed", "wide_seed")}) == 3


def test_the_validation_curve_of_plain_soup_is_soups(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["ensemble"]["merge"] = "soup"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    shutil.rmtree(run / "fused")
    assert set(facts(run)["training"]["validation"]) == {*SEEDS, "soup"}


def said(run: Path) -> str:
    write_report(run)
    assert (run / "report.html").is_file()
    return (run / "report.md").read_text()


def test_an_interrupted_run_says_so(run):
    for name in ("seed_42", "fused"):
        shutil.rmtree(run / name)
    (run / "results.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "train/lo')
    text = said(run)
    assert "The run is not finished: seed_42 is not trained; repeat its command with --resume" in text
    assert "No test set was scored" in text
    assert "**The run is not finished, so there is no verdict.**" in text
    assert "| seed_11 |" in text


def test_nothing_but_settings_is_a_report_too(run):
    for path in run.iterdir():
        if path.name != "run.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = said(run)
    for sentence in ("no verdict", "No training losses", "There was no validation.", "no config.yaml", "No test set"):
        assert sentence in text


def test_seeds_left_out_and_adapters_that_cannot_be_read(run):
    (run / "excluded.json").write_text('{"seed_42": "training loss not finite in step 3"}')
    shutil.rmtree(run / "seed_42")
    (run / "fused" / "adapter_model.safetensors").write_bytes(b"broken")
    text = said(run)
    assert "seed_42 was left out: training loss not finite in step 3." in text
    assert "The adapters cannot be read" in text
    assert "not finished" not in text


def test_adapters_are_hashed_once_also_where_tasks_were_scored(run, monkeypatch):
    (run / "evaluation").mkdir(exist_ok=True)
    labels = ["base", *SEEDS, "fused"]
    sha256 = {label: None if label == "base" else adapter_sha256(run / label) for label in labels}
    known = {label: {"prompt": "plain", "weights_sha256": found} for label, found in sha256.items()}
    hashed, real = [], record.files_sha256
    for module in (record, adapter_file):
        monkeypatch.setattr(module, "files_sha256", lambda files: hashed.extend(files) or real(files))
    for changed in ([], ["seed_42"]):
        adapters = known | {label: known[label] | {"weights_sha256": "another"} for label in changed}
        settings = {"protocol": "paper", "adapters": adapters, "tasks": {}}
        (run / "evaluation" / "settings.json").write_text(json.dumps(settings))
        hashed.clear()
        assert ("answered with other weights" in said(run)) == bool(changed)
        assert sorted(hashed) == sorted(run / label / "adapter_model.safetensors" for label in [*SEEDS, "fused"])


def test_one_seed_without_validation_or_test(tiny_llama, tmp_path, capsys):
    options = ["--ensemble.seeds", "[11]", "--merge", "none", "--data.num_val", "0", "--data.num_test", "0"]
    assert train(tmp_path / "one", tiny_llama, *options, "--compare", "ties") == 0
    assert "report: " in (shown := capsys.readouterr().out)
    text = (tmp_path / "one" / "report.md").read_text()
    for sentence in ("Only one seed was trained", "Nothing was merged.", "There was no validation.", "No test set"):
        assert sentence in text
    idle = "With one seed --compare does nothing: there is nothing to merge or compare."
    assert idle in text
    assert idle in " ".join(re.sub("[│]", " ", shown).split())


def test_sub_domains_of_a_part_of_the_test_rows(tiny_llama, tmp_path):
    terms = ["--data.task_options", '{"min_terms": 2, "max_terms": 4}', "--data.eval_batch_size", "5"]
    sizes = ["--data.num_test", "30", "--trainer.limit_test_batches", "3", "--ensemble.seeds", "[11]"]
    assert train(tmp_path / "run", tiny_llama, *terms, *sizes) == 0
    data = ReasoningGym(task_options={"min_terms": 2, "max_terms": 4}, num_train=16, num_val=4, num_test=30)
    # The shortest come first, and the tiny model's tokens are bytes.
    questions = [f"{item['question']}\n{item['answer']}" for item in data.items["test"]]
    scored = sorted(sorted(range(30), key=lambda i: len(questions[i]))[:15])
    wanted = Counter(str(data.items["test"][i]["metadata"]["num_terms"]) for i in scored)
    found = json.loads((tmp_path / "run" / "report.json").read_text())
    (test,) = found["tests"]
    assert found["train_sample"]["rows"] == 15
    assert "loss-score" in figures(found)
    assert "loss-score" not in figures(found | {"adapters": found["adapters"][:1]}), "one dot says nothing"
    assert "Mean seed" not in (tmp_path / "run" / "report.md").read_text()
    rows = {row["domain"]: row["items"] for row in test["domains"] if row["domain"].startswith("num_terms")}
    assert rows == {f"num_terms {value}": count for value, count in wanted.items()}


def test_a_fault_in_the_report_does_not_lose_the_run(tiny_llama, tmp_path, capsys, monkeypatch):
    def fail(_run):
        raise RuntimeError("no ink")

    monkeypatch.setattr(cli, "write_report", fail)
    assert train(tmp_path / "run", tiny_llama, "--merge", "soup", "--data.num_val", "0") == 0
    assert "train.py: no report: RuntimeError: no ink; the run is whole" in capsys.readouterr().err
    assert (tmp_path / "run" / "results.json").is_file()
    # Plain soup is the fused adapter: one label for both.
    found = facts(tmp_path / "run")
    assert found["train_sample"]["losses"].keys() == {"base", *SEEDS, "soup"}
    assert found["merged"] == "soup"
    assert list(found["weights"]["distributions"]["density"]) == [*SEEDS, "soup"]
    assert found["verdict"].startswith("Soup: no difference from the mean seed shown")


def test_passes_and_long_curves(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["ensemble"]["seeds"] = [42, 11]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "metrics.jsonl").unlink()
    for seed, loss in ((11, 2.0), (42, 3.0)):
        lines = [{"step": i, f"train/loss_seed_{seed}": loss + i % 2} for i in range(2 * POINTS)]
        lines.append({"step": 2 * POINTS - 1, "val/loss_fused": loss, f"val/loss_seed_{seed}": float("nan")})
        (run / f"metrics-{seed}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    training = facts(run)["training"]
    assert training["steps_per_point"] == 2
    assert training["train"]["seed_42"] == [[2.0 * (i + 1), 3.5] for i in range(POINTS)]
    # Seed 11 came last, and with it the fused adapter of all; what is not finite is no point.
    assert training["validation"] == {"fused": [[2 * POINTS, 2.0]]}


def test_the_command_rebuilds_and_compares(stored, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = shutil.copytree(run, tmp_path / "other|<run>")
    for name in ("report.html", "report.md", "report.json"):
        (run / name).unlink()
    results = json.loads((other / "results.json").read_text())
    outcomes = results["items"] | {"fused": results["items"]["fused"].replace("1", "0", 9)}
    results = with_items(results, outcomes)
    (other / "results.json").write_text(json.dumps(results))
    assert shell.main(["report", str(run), str(other)]) == 0
    shown = capsys.readouterr().out
    assert (run / "report.html").read_bytes() == (stored / "report.html").read_bytes()
    assert "better than the mean seed" in " ".join(shown.split())
    assert "report: comparison/report.html" in shown
    found = json.loads(Path("comparison/report.json").read_text())
    assert [row["run"] for row in found["runs"]] == ["a_run", "other|<run>"]
    assert found["runs"][0]["against_mean_seed"]["n"] == 120
    # The same items: nine that only the first has right.
    assert found["verdict"].startswith(
        "other|<run> against a_run, fused adapters on the same 120 items: worse, -7.5 points"
    )
    assert found["verdict"] in shown
    assert all(len(line) <= 80 for line in shown.splitlines() if line.startswith("│"))
    (paired,) = found["paired"]
    assert (paired["run"], paired["against"]) == ("other|<run>", "a_run")
    assert (paired["value"], paired["p_value"]) == pytest.approx((-9 / 120, 2 / 2**9))
    check(Path("comparison"))
    (other / "results.json").write_text(json.dumps(results | {"items_sha256": "of others"}))
    assert shell.main(["report", str(run), str(other)]) == 0
    found = json.loads(Path("comparison/report.json").read_text())
    assert found["paired"] == []
    assert found["missing"][0].startswith("other|<run> was not tested on the items of a run before it")
    assert "other|&lt;run&gt;" in Path("comparison/report.html").read_text()
    assert "other\\|<run>" in Path("comparison/report.md").read_text()
    assert "**No two of these runs were tested on the same items.**" in Path("comparison/report.md").read_text()
    twin = shutil.copytree(run, tmp_path / "x" / "a_run")
    assert shell.main(["report", str(run), str(twin)]) == 0
    found = json.loads(Path("comparison/report.json").read_text())
    assert [row["run"] for row in found["runs"]] == ["a_run", "x/a_run"]
    assert found["verdict"].startswith(
        "x/a_run against a_run, fused adapters on the same 120 items: no difference shown"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [(["nowhere"], "nowhere holds no run: it has no run.json"), (["a_run", "./a_run"], "a_run is given twice")],
)
def test_what_cannot_be_reported(words, message, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shell.main(["report", *words]) == 2
    assert message in capsys.readouterr().err


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
