"""``train.py --evaluate`` on the stack in memory, and ``train.py test`` on a finished run."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from seedlora.cli.main import main as shell
from seedlora.cli.train import main
from seedlora.datamodules import ReasoningGym
from tests.helpers.commands import train


@pytest.fixture(autouse=True)
def _gsm8k(_own_folder):
    rows = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(5)]
    Path("gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(tiny_llama, *options):
    small = ["--model.dtype", "float32", "--data.num_test", "6", "--ensemble.dirpath", "run"]
    return train(tiny_llama, *small, *options)


EVALUATE = ["--evaluate", "gsm8k", "--evaluate.limit", "4", "--evaluate.max_new_tokens", "6"]
BOOLQ = ["--evaluate", "boolq", "--evaluate.task_path"]
EVALUATE += ["--evaluate.task_path", '{"gsm8k": "gsm8k.jsonl"}']


def answers(folder):
    lines = [json.loads(line) for line in Path(folder, "samples.jsonl").read_text().splitlines()]
    return {(s["adapter"], s["item"]): s["text"] for s in lines}


def test_all_adapters_are_scored_after_training_as_they_are_from_their_folders(tiny_llama, capsys):
    assert run(tiny_llama, *EVALUATE) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "gsm8k: protocol paper, but 6 new tokens, n = 4" in shown
    assert "prompt style: plain" in shown
    found = json.loads(Path("run/evaluation/results.json").read_text())["tasks"]["gsm8k"]
    assert list(found["scores"]) == ["base", "seed_11", "seed_42", "seed_202", "soup", "fused"]
    assert set(found["differences"]["fused"]) == {"mean seed", "best seed", "soup"}
    report = json.loads(Path("run/report.json").read_text())
    assert [(test["name"], test["n"]) for test in report["tests"]] == [("test set", 6), ("gsm8k", 4)]
    words = ["evaluate", "--task", "gsm8k", "--task_path", "gsm8k=gsm8k.jsonl", "--limit", "4", "--max_new_tokens", "6"]
    words += [word for name in ("seed_11", "fused") for word in ("--adapter", f"run/{name}")]
    assert shell([*words, "--dtype", "float32", "--prompt_style", "plain", "--with_base"]) == 0
    in_memory, from_folders = answers("run/evaluation"), answers("evaluation")
    assert len(from_folders) == 12
    assert {key: in_memory[key] for key in from_folders} == from_folders


def test_adapters_of_a_quantised_base_are_scored_on_it_from_their_folders(tiny_llama, capsys):
    pytest.importorskip("bitsandbytes")
    loftq = ["--model.adapter", "loftq", "--model.quantization", "nf4", "--ensemble.seeds", "[1,2]"]
    assert run(tiny_llama, *loftq, *EVALUATE, "--ensemble.budget", "full", "--trainer.max_epochs", "1") == 0
    words = ["evaluate", "--task", "gsm8k", "--task_path", "gsm8k=gsm8k.jsonl", "--limit", "4", "--max_new_tokens", "6"]
    words += ["--dtype", "float32", "--with_base", "--adapter", "run/seed_1"]
    assert shell([*words, "--adapter", "run/fused"]) == 0
    assert "base model in nf4" in capsys.readouterr().out
    in_memory, from_folders = answers("run/evaluation"), answers("evaluation")
    assert len(from_folders) == 12
    assert {key: in_memory[key] for key in from_folders} == from_folders
    Path("run/seed_2/base.json").unlink()
    assert shell([*words, "--adapter", "run/fused", "--adapter", "run/seed_2"]) == 2
    assert "different quantization (nf4: seed_1, fused; none: seed_2); score them apart" in capsys.readouterr().err
    for name in ("seed_1", "fused"):
        Path("run", name, "base.json").unlink()
    assert shell([*words, "--adapter", "run/fused", "--out", "original"]) == 0
    assert answers("original") != from_folders, "or nothing is compared above"


def test_a_finished_run_is_scored_again_without_training(tiny_llama, capsys):
    assert run(tiny_llama) == 0
    before = {path: path.stat().st_mtime_ns for path in Path("run").glob("*/adapter_model.safetensors")}
    first = json.loads(Path("run/results.json").read_text())
    assert len(before) == 5  # seeds, soup, fused
    capsys.readouterr()
    assert main(["test", "--ensemble.dirpath", "run", *EVALUATE]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert json.loads(Path("run/results.json").read_text()) == first
    assert len(answers("run/evaluation")) == 24
    assert main(["test", "--ensemble.dirpath=run", *EVALUATE]) == 0
    assert "24 of 24 answers are there already" in capsys.readouterr().out
    # Tasks of the harness that the run was scored on are not scored again when other tasks are given.
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    config["evaluate"]["lm_eval"] = "no_such_task"
    Path("run/config.yaml").write_text(yaml.safe_dump(config))
    assert main(["test", "--ensemble.dirpath=run", *EVALUATE]) == 0


def test_the_task_of_the_training_is_scored_on_the_runs_own_test_split(tiny_llama):
    options = ["--data.data_seed", "5", "--ensemble.seeds", "[1]", "--evaluate.max_new_tokens", "2"]
    assert run(tiny_llama, *options, "--evaluate", "chain_sum,gcd", "--evaluate.limit", "6") == 0
    data = ReasoningGym(num_train=16, num_val=4, num_test=6, data_seed=5)
    wanted = [hashlib.sha256(f"True{row['question']}\n".encode()).hexdigest()[:16] for row in data.items["test"]]
    lines = [json.loads(line) for line in Path("run/evaluation/samples.jsonl").read_text().splitlines()]
    asked = {line["item"]: line["prompt_sha256"] for line in lines if line["task"] == "chain_sum"}
    assert [asked[str(i)] for i in range(6)] == wanted
    assert list(json.loads(Path("run/evaluation/results.json").read_text())["tasks"]) == ["chain_sum", "gcd"]


def report():
    return json.loads(Path("run/report.json").read_text())


def test_a_run_that_is_merged_anew_does_not_show_the_older_scores(tiny_llama, capsys):
    assert run(tiny_llama, "--merge", "seedlora", *EVALUATE) == 0
    others = {key: text for key, text in answers("run/evaluation").items() if key[0] != "fused"}
    assert run(tiny_llama, "--merge", "ties", "--resume") == 0
    assert [test["name"] for test in report()["tests"]] == ["test set"]
    told = "before the seeds were merged anew, and fused answered with other weights"
    assert told in " ".join(report()["missing"])
    capsys.readouterr()
    assert run(tiny_llama, "--merge", "ties", "--resume", *EVALUATE) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "older answers of fused were dropped" in shown
    assert "20 of 24 answers are there already" in shown
    again = answers("run/evaluation")
    assert {key: again[key] for key in others} == others
    # Fused as before, so the scores stay; what is refused costs neither them nor the report.
    assert run(tiny_llama, "--merge", "ties", "--resume", *EVALUATE, "--evaluate.max_new_tokens", "7") == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert error[0].startswith("not scored: run/evaluation holds samples generated with tasks.gsm8k.max_new_")
    assert "or move that folder away" in error[0]
    assert [test["name"] for test in report()["tests"]] == ["test set", "gsm8k"]
    assert told not in " ".join(report()["missing"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--evaluate", "gsm9k"], "Unknown task 'gsm9k'"),
        (["--evaluate", "gsm8k", "--evaluate.limit", "0"], "error: limit must be at least 1, got 0"),
        (
            [*BOOLQ, "{}", "--evaluate.max_new_tokens", "0"],
            "error: max_new_tokens must be at least 1, got 0",
        ),
        (["--evaluate", "boolq"], "task boolq needs its test file; give it by task_path"),
        ([*BOOLQ, "{boolq: no}"], "--evaluate.task_path takes text, got False"),
        ([*BOOLQ, "{boolq: no.jsonl}"], "error: task_path no.jsonl does not exist"),
        ([*BOOLQ, "{piqa: rows}"], "error: task_path names 'piqa', which is not asked for; asked for are boolq"),
        (["--evaluate", "gsm8k", "--data.task", "gsm_symbolic"], "after training on gsm_symbolic, whose rows are"),
        (["--evaluate.lm_eval", "gsm8k_cot", "--data.task", "gsm_symbolic"], "scoring gsm8k_cot after training on gsm"),
        (["--evaluat", "gsm8k"], "did you mean --evaluate?"),
        (["test"], "test needs the run to score"),
        (["test", "--ensemble.dirpath", "nowhere"], "nowhere holds no run: it has no config.yaml"),
    ],
)
def test_what_cannot_be_done_is_said_before_training(tiny_llama, words, message, capsys):
    assert (main(words) if words[0] == "test" else train(tiny_llama, *words)) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_run_that_is_unfinished_or_was_merged_otherwise_cannot_be_tested(tiny_llama, capsys):
    assert run(tiny_llama) == 0
    assert main(["test", "--ensemble.dirpath", "run", "--merge", "ties"]) == 2
    assert "run was merged by seedlora; --resume instead of test merges it by ties" in capsys.readouterr().err
    on_part = ("--ensemble.merge_options", "{layers: ffn, rest: soup}")
    assert main(["test", "--ensemble.dirpath", "run", *on_part]) == 2
    assert re.search(
        r'merged by seedlora; --resume .* by seedlora \{"layers": "ffn", "rest": "soup"\}', capsys.readouterr().err
    )
    shutil.rmtree("run/seed_42")
    assert main(["test", "--ensemble.dirpath", "run"]) == 2
    assert "run is not finished: seed_42 is not trained; use --resume" in capsys.readouterr().err


def test_methods_and_controls_answer_the_same_items(tiny_llama):
    assert run(tiny_llama, *EVALUATE, "--compare", "ties", "--controls", "untrained") == 0
    found = json.loads(Path("run/evaluation/results.json").read_text())["tasks"]["gsm8k"]
    beside = {"ties", "logit_mean", "gain_seed", "gain_soup", "greedy_soup"}
    assert set(found["scores"]) == {"base", "seed_11", "seed_42", "seed_202", "soup", "fused", *beside}
    assert {len(digits) for digits in found["items"].values()} == {4}
    settings = json.loads(Path("run/evaluation/settings.json").read_text())
    assert "logit_mean" in json.dumps(settings)
