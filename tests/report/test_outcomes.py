"""The outcomes of tests in a report: intervals, p-values and sub-domains against independent ones."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from seedlora.cli import main as shell
from seedlora.datamodules import ReasoningGym
from seedlora.report.facts import facts
from seedlora.report.figures import figures
from seedlora.report.outcomes import describe_test
from seedlora.report.page import write_report
from tests.helpers.report_runs import SEEDS, check_numbers, items, outcomes, train_into, with_items


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


def test_chance_and_all_winners_in_the_heat_map_of_mmlu(run, tmp_path):
    """From a file of MMLU's form through evaluate into the report."""
    rows = [
        {"question": f"{i}?", "choices": ["a", "b", "c", "d"], "answer": i % 4, "subject": "law" if i < 3 else "art"}
        for i in range(5)
    ]
    (tmp_path / "mmlu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapters = [word for name in (*SEEDS, "soup", "fused") for word in ("--adapter", str(run / name))]
    task = ["--task", "mmlu", "--task_path", f"mmlu={tmp_path / 'mmlu.jsonl'}", "--out", str(run / "evaluation")]
    assert shell.main(["evaluate", *adapters, *task, "--dtype", "float32"]) == 0
    results = json.loads((run / "evaluation" / "results.json").read_text())
    assert len(results["tasks"]["mmlu"]["items_sha256"]) == 64
    right = {"seed_11": "11000", "seed_42": "00000", "seed_202": "01100", "soup": "00001", "fused": "00001"}
    results["tasks"]["mmlu"] = with_items(results["tasks"]["mmlu"], right)
    (run / "evaluation" / "results.json").write_text(json.dumps(results))
    write_report(run)
    check_numbers(run)
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


def test_sub_domains_of_a_part_of_the_test_rows(tiny_llama, tmp_path):
    terms = ["--data.task_options", '{"min_terms": 2, "max_terms": 4}', "--data.eval_batch_size", "5"]
    sizes = ["--data.num_test", "30", "--trainer.limit_test_batches", "3", "--ensemble.seeds", "[11]"]
    assert train_into(tmp_path / "run", tiny_llama, *terms, *sizes) == 0
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
