"""Several tasks as one: both views of KnOTS against tables counted by hand, generated tasks, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from seedlora.adapters.writing import write_adapter
from seedlora.cli.main import main
from seedlora.datamodules import ReasoningGym, reasoning_gym
from seedlora.evaluation.items import load_items
from seedlora.evaluation.joint import joint, joint_table
from seedlora.evaluation.tasks import TASKS
from tests.helpers.models import built


def column(digits):
    return np.array([digit == "1" for digit in digits])


def test_both_views_are_those_counted_by_hand():
    names = ["a", "b", "fused"]
    correct = {
        "a": np.stack([column("11110000"), column("00000001"), column("11000100")], axis=1),
        "b": np.stack([column("0000"), column("1111"), column("1110")], axis=1),
    }
    found = joint(correct, names)
    assert found.tasks == {"a": 8, "b": 4}
    assert found.own == {"a": "a", "b": "b"}
    assert [(found.union[name].value, found.union[name].n) for name in names] == [(4 / 12, 12), (5 / 12, 12), (0.5, 12)]
    assert found.normalised["fused"] == {"a": 0.75, "b": 0.75}
    assert found.normalised["b"] == {"a": 0.25, "b": 1.0}
    assert [found.mean[name].value for name in names] == [0.5, 0.625, 0.75]
    assert (found.mean["a"].low, found.mean["a"].high) == (0.5, 0.5), "1 on its own task and 0 on the other, always"
    assert found.mean["fused"].low < 0.75 < found.mean["fused"].high


def test_the_interval_of_the_mean_is_that_of_resampled_items():
    rng = np.random.default_rng(5)
    correct = {task: rng.random((60, 3)) < 0.6 for task in ("a", "b")}
    found = joint(correct, ["a", "b", "fused"]).mean["fused"]
    draws = []
    for _ in range(4000):
        parts = []
        for i, matrix in enumerate(correct.values()):
            some = matrix[rng.integers(60, size=60)]
            parts.append(some[:, 2].mean() / some[:, i].mean())
        draws.append(np.mean(parts))
    np.testing.assert_allclose([found.low, found.high], np.quantile(draws, [0.025, 0.975]), atol=0.03)


def test_a_task_without_an_own_score_is_left_out_of_the_mean():
    correct = {
        "a": np.stack([column("1100"), column("1000")], axis=1),
        "b": np.stack([column("0000"), column("1111")], axis=1),
    }
    found = joint(correct, ["a", "fused"])
    assert found.own == {"a": "a"}
    assert found.normalised["fused"] == {"a": 0.5, "b": None}
    assert found.mean["fused"].value == 0.5
    silent = joint({"b": correct["b"]}, ["b", "fused"])
    assert silent.own == {"b": "b"}
    assert silent.mean == {"b": None, "fused": None}
    json.dumps(silent.to_record())


def test_generated_items_are_the_test_split_of_training(tmp_path):
    data = ReasoningGym(task="leg_counting", num_train=5, num_val=3, num_test=4, data_seed=7)
    settings = {f"data.{key}": value for key, value in data.hparams.items()} | {"data": "ReasoningGym"}
    (tmp_path / "run.json").write_text(json.dumps(settings))
    items = load_items("leg_counting", path=tmp_path, generate=reasoning_gym.generated_test)
    assert [(item.request, item.gold) for item in items] == [
        (row["question"], str(row["answer"])) for row in data.items["test"]
    ]
    by_default = load_items("leg_counting", limit=2, generate=reasoning_gym.generated_test)
    assert by_default[0].request == ReasoningGym(task="leg_counting").items["test"][0]["question"]
    judge = TASKS["leg_counting"].judge
    said = [f" {items[0].gold}\n", items[0].gold + "0", ""]
    assert [judge(text, items[0]).correct for text in said] == [True, False, False]
    with pytest.raises(ValueError, match="of a run that was trained on leg_counting"):
        load_items("gcd", path=tmp_path, generate=reasoning_gym.generated_test)
    with pytest.raises(ValueError, match="task gcd needs its test file; give it by task_path"):
        load_items("gcd")


@pytest.fixture(scope="module")
def adapters(tiny_llama, tmp_path_factory):
    module = built(tiny_llama, 1, 2)
    root = tmp_path_factory.mktemp("adapters")
    for replica, name in zip(module.replicas, ("chain_sum", "leg_counting"), strict=True):
        write_adapter(root / name, module.stack.stored_factors(replica.name), module.options.lora_config())
    return root


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(adapters, *words, tasks="chain_sum,leg_counting"):
    given = [word for name in ("chain_sum", "leg_counting") for word in ("--adapter", str(adapters / name))]
    words = ["--task", tasks, "--joint", "--limit", "3", "--max_new_tokens", "4", "--dtype", "float32", *words]
    return main(["evaluate", *given, *words])


def test_merged_across_tasks_and_scored_from_the_shell(adapters, capsys):
    sources = [str(adapters / name) for name in ("chain_sum", "leg_counting")]
    assert main(["merge", *sources, "--method", "knots_ties", "--out", "fused"]) == 0
    assert run(adapters, "--adapter", "fused", "--with_base") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "joint: 2 tasks, n = 6, 95 % intervals" in shown
    assert "the own adapter of chain_sum, leg_counting has nothing right" in shown
    found = json.loads(Path("evaluation/results.json").read_text())
    assert list(found["joint"]["union"]) == ["base", "chain_sum", "leg_counting", "fused"]
    assert found["joint"]["own"] == {"chain_sum": "chain_sum", "leg_counting": "leg_counting"}
    assert found["joint"]["mean"]["fused"] is None
    assert {task["max_new_tokens"] for task in found["tasks"].values()} == {4}


def test_the_limit_of_new_tokens_gives_no_hint(adapters, monkeypatch):
    from dataclasses import replace

    from seedlora.evaluation.scoring import task_runs, with_common_limit

    monkeypatch.setattr("seedlora.evaluation.scoring.TASKS", {**TASKS, "gcd": replace(TASKS["gcd"], max_new_tokens=77)})
    runs = with_common_limit(task_runs(["gcd", "chain_sum"], limit=1, generate=reasoning_gym.generated_test))
    assert [run.max_new_tokens for run in runs] == [77, 77]


BAD = [
    ("chain_sum", "joint scores several tasks together; name at least two"),
    ("chain_sum,gsm8k", "answers of chain_sum and gsm8k begin or end differently"),
    ("chain_sum,humaneval", "cannot take humaneval: its answers are programs"),
]


@pytest.mark.parametrize(("tasks", "message"), BAD, ids=[tasks for tasks, _ in BAD])
def test_what_cannot_be_joint_is_one_sentence(adapters, tasks, message, capsys):
    rows = [{"question": "1 + 1?", "answer": "#### 2"}]
    Path("gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problem = {"task_id": "0", "prompt": "def f():", "test": "def check(f): pass", "entry_point": "f"}
    Path("humaneval.jsonl").write_text(json.dumps(problem) + "\n")
    other = tasks.partition(",")[2]
    path = ["--task_path", f"{other}={other}.jsonl"] if other else []
    assert run(adapters, *path, tasks=tasks) == 2
    assert message in capsys.readouterr().err
    assert not Path("evaluation").exists()


def test_resamples_without_a_ratio_are_counted():
    """The own adapter has one of four items: a resample misses it with probability (3/4)^4."""
    correct = {"a": np.stack([column("1000"), column("1100")], axis=1)}
    found = joint(correct, ["a", "fused"], resamples=20_000)
    assert found.mean["fused"].resamples == 20_000
    assert found.mean["fused"].undefined / 20_000 == pytest.approx(0.75**4, abs=0.01)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(joint_table(found))
    assert "32 % of the resamples have an own adapter with nothing right" in " ".join(console.export_text().split())
