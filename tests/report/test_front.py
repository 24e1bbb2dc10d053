"""The first screen of a report."""

from __future__ import annotations

import json
import shutil

from seedlora.records.cost import COST
from seedlora.report.facts import facts
from seedlora.report.front import title_of
from tests.helpers.report_runs import with_items, written_text


def test_the_first_screen_says_what_to_use_how_sure_that_is_and_what_it_cost(stored):
    found = json.loads((stored / "report.json").read_text())
    front, cost = found["front"], COST.read(stored)
    scores = {row["adapter"]: row for row in found["tests"][0]["scores"]}
    assert (front["adapter"], front["path"]) == ("fused", str(stored / "fused"))
    assert front["commands"][0]["line"] == f"python -m seedlora chat {stored / 'fused'}"
    assert front["before"]["value"] == scores["base"]["value"]
    assert front["after"]["value"] == scores["fused"]["value"]
    assert front["helped"].startswith("Training helped: ")
    assert front["sure"] == "Use fused: no other adapter of the run is shown to be better."
    assert front["tokens"] == sum(row["tokens"] for row in found["trained_on"].values())
    assert front["seconds"] == sum(cost["took"]["seeds"].values())
    assert front["peak_gib"] == cost["peak_bytes"] / 2**30
    assert front["started"] == cost["started"][:10]
    text = (stored / "report.html").read_text()
    head = text[text.index("<header>") : text.index("</header>")]
    for said in ("Use <strong>", "How sure is that?", "Train longer, or fuse?", "It took", 'class="copy"', "<svg"):
        assert said in head
    before, after = (f"<b>{100 * front[key]['value']:.1f}\u00a0%</b>" for key in ("before", "after"))
    assert head.index(before) < head.index(after)


def test_the_title_says_model_data_and_day(stored, run, tmp_path):
    front = json.loads((stored / "report.json").read_text())["front"]
    front |= {"model": "SmolLM2-135M-Instruct", "data": "chain_sum", "started": "2026-11-03"}
    assert title_of(front) == "SmolLM2-135M-Instruct on chain_sum, 3 November 2026"
    assert title_of(front | {"started": None}) == "SmolLM2-135M-Instruct on chain_sum"
    # Runs of before the day was stored are named by it, or say nothing.
    cost = json.loads((run / "cost.json").read_text())
    del cost["started"]
    (run / "cost.json").write_text(json.dumps(cost))
    assert facts(run)["title"] == "tiny-llama on chain_sum"
    named = shutil.move(run, tmp_path / "2026-11-30_19-08-50")
    assert facts(named)["title"] == "tiny-llama on chain_sum, 30 November 2026"


def test_a_run_that_harmed_advises_the_base_model_and_no_command(run):
    results = json.loads((run / "results.json").read_text())
    outcomes = dict.fromkeys(results["items"], "0" * 120) | {"base": "1" * 120}
    (run / "results.json").write_text(json.dumps(with_items(results, outcomes)))
    front = facts(run)["front"]
    assert (front["adapter"], front["path"], front["commands"]) == ("base", None, [])
    text = written_text(run)
    assert "**Use base**" in text
    assert "Training harmed: 100.0 of the base model, 0.0 of fused" in text


def test_an_unfinished_run_says_how_far_it_is(run):
    shutil.rmtree(run / "seed_202")
    shutil.rmtree(run / "fused")
    (run / "results.json").unlink()
    front = facts(run)["front"]
    assert (front["adapter"], front["helped"], front["sure"]) == (None, "", "")
    assert front["state"].startswith("2 of 3 seeds are trained; seed_202 at step 4 of 4. Validation loss so far: ")
    assert front["state"] in written_text(run)
