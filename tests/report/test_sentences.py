"""The sentences of a report: its verdict, and what was left out."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

from rich.console import Console

from seedlora.cli import training_run as cli
from seedlora.report.facts import facts
from tests.helpers.report_runs import with_items, written_text


def test_the_verdict_is_the_comparison_with_its_interval(stored):
    found = json.loads((stored / "report.json").read_text())
    row = next(r for r in found["tests"][0]["comparisons"] if (r["adapter"], r["against"]) == ("fused", "mean seed"))
    assert found["verdict"].startswith("Training helped: 1.7 of the base model, 63.3 of fused; +61.7 points")
    assert "Use fused: no other adapter of the run is shown to be better." in found["verdict"]
    assert "The fused adapter (seedlora): better than the mean seed, " in found["verdict"]
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
        "--controls equal_tokens.",
        "--controls untrained, with validation rows.",
    ]
    assert found["reproduce"]["versions"].keys() >= {"python", "torch", "reasoning-gym"}
    assert found["cost"]["steps"] == 4


def test_the_fused_adapter_names_the_layers_it_was_made_of(run):
    record = json.loads((run / "fused" / "fusion.json").read_text())
    assert "Merge method: seedlora.\n" in (run / "report.md").read_text()
    record["use"] |= {"layers": "ffn", "rest": "soup"}
    (run / "fused" / "fusion.json").write_text(json.dumps(record))
    assert "Merge method: seedlora (layers=ffn, rest=soup).\n" in written_text(run)


def test_without_a_test_the_verdict_is_of_validation(run):
    (run / "results.json").unlink()
    found = facts(run)
    row = found["selection"]["against"]["soup"]
    assert found["verdict"].startswith("There was no test, so it is not known whether training helped. Use fused: ")
    assert "The fused adapter (seedlora) was not tested. Its loss on the 4 validation rows: " in found["verdict"]
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
    asked, _, where = capsys.readouterr().out.splitlines()
    assert asked.startswith("Train longer, or fuse? That cannot be said: too few validations")
    assert where == f"report: {run / 'report.html'}"
    text, found = (run / "report.md").read_text(), json.loads((run / "report.json").read_text())
    assert "The fused adapter (seedlora) is worse than soup: it gets 16.7 points less of the test items (" in text
    assert found["advice"]["headline"][1] == "Use soup: it is shown to be better than the fused adapter."
    assert found["advice"]["headline"][0] in text
    assert "**How sure is that?** It is shown to be better than the fused adapter." in text
    assert text.startswith("# tiny-llama on chain_sum, ")
    assert "seeds 11, 42, 202; " in text.splitlines()[2]


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
    text = written_text(run)
    for sentence in (
        "- Of the rows of the data: 5 too long left out.",
        "- seed_42 was stopped after step 3: its validation loss improved no more.",
        "- Of seed_11 the weights of step 2 were kept, its best validation",
        "- Without a finite validation loss, and so not chosen: ties.",
        "- The greedy soup is of seed_11, seed_202; seed_42 would harm.",
        "gain_seed is seed_202, the best seed of these rows.",
        f"| tokens | {trained['seed_11']['tokens'] + trained['seed_202']['tokens'] + 700:,} |",
        "| seed_42 | 3 | 700 |",
    ):
        assert sentence in text, sentence
