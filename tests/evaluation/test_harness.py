"""lm-evaluation-harness on the model in memory, for real, on a task of our own from a file."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from seedlora.adapters.writing import write_adapter
from seedlora.cli.main import main
from seedlora.cli.train import main as train
from seedlora.evaluation.generate import StackGenerator
from seedlora.evaluation.harness import check_harness, harness_scores
from tests.helpers.models import built

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

TASK = """\
task: our_choice
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
"""
ROWS = [{"q": f"Row {i}:", "choices": [f" {i}a", f" {i}b", " xyz"], "answer": i % 3} for i in range(12)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf" / "datasets"))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "tasks" / "ours.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    return tmp_path / "tasks"


def by_hand(module, name):
    """Share of rows whose right choice has the greatest likelihood, one choice at a time."""
    right = 0
    for row in ROWS:
        scores = []
        for choice in row["choices"]:
            ids = torch.tensor([module.tokenizer(row["q"] + choice)["input_ids"]])
            start = len(module.tokenizer(row["q"])["input_ids"])
            module.stack.route([name])
            with torch.no_grad():
                logs = module.model(input_ids=ids).logits[0].log_softmax(-1)
            scores.append(sum(logs[t - 1, ids[0, t]].item() for t in range(start, ids.shape[1])))
        right += int(np.argmax(scores)) == row["answer"]
    return right / len(ROWS)


def test_scores_of_two_adapters_and_nothing_is_disturbed(tiny_llama, folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)  # no git repository
    module = built(tiny_llama, 1, 2)
    names = {"base": None, "seed_1": "seed_1", "seed_2": "seed_2"}
    base = module.model.get_base_model()
    generator = StackGenerator(base, module.tokenizer, route=module.stack.route, adapters=names, batch_size=4)
    wanted = {label: by_hand(module, name) for label, name in names.items()}
    manager = check_harness(["our_choice"], folder)
    module.model.train()
    modes = [m.training for m in module.model.modules()]
    padding = module.tokenizer.pad_token
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    found = harness_scores(generator, list(names), ["our_choice"], manager)
    assert "git" not in capfd.readouterr().err
    assert {name: scores["our_choice"]["acc"].value for name, scores in found.items()} == pytest.approx(wanted)
    assert len(set(wanted.values())) > 1, "the adapters must differ"
    assert found["base"]["our_choice"]["acc"].stderr > 0
    assert [m.training for m in module.model.modules()] == modes
    assert module.tokenizer.pad_token == padding
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])


def test_a_task_is_scored_from_the_shell(tiny_llama, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = built(tiny_llama, 1)
    write_adapter("one", module.stack.stored_factors("seed_1"), module.options.lora_config())
    words = ["evaluate", "--adapter", "one", "--with_base", "--lm_eval_path", str(folder), "--dtype", "float32"]
    assert main([*words, "--lm_eval", "our_choice", "--limit", "6"]) == 0
    assert "protocol lm-eval, 6 documents of each task" in capsys.readouterr().out
    found = json.loads(Path("evaluation/lm_eval.json").read_text())
    assert (found["protocol"], list(found["scores"])) == ("lm-eval", ["base", "one"])


def test_after_training_all_but_mixtures_are_scored(tiny_llama, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sizes = ["--data.num_train", "16", "--data.num_val", "4", "--data.num_test", "6", "--data.batch_size", "4"]
    words = ["--model.base_model", tiny_llama, "--model.dtype", "float32", *sizes, "--ensemble.dirpath", "run"]
    words += ["--controls", "untrained", "--evaluate.limit", "6", "--evaluate.lm_eval_path", str(folder)]
    assert train([*words, "--evaluate.lm_eval", "our_choice"]) == 0
    assert "protocol lm-eval, 6 documents of each task" in " ".join(capsys.readouterr().out.split())
    found = json.loads(Path("run/evaluation/lm_eval.json").read_text())["scores"]
    labels = ["base", "seed_11", "seed_42", "seed_202", "soup", "fused", "gain_seed", "gain_soup", "greedy_soup"]
    assert list(found) == labels
    words = ["evaluate", "--adapter", "run/seed_42", "--lm_eval_path", str(folder), "--dtype", "float32"]
    assert main([*words, "--lm_eval", "our_choice", "--limit", "6"]) == 0
    alone = json.loads(Path("evaluation/lm_eval.json").read_text())["scores"]
    assert alone["seed_42"]["our_choice"] == found["seed_42"]["our_choice"]


def test_tasks_that_run_generated_code_are_refused_before_the_model_is_loaded(folder, capsys):
    """Also in a group, a group of groups, an inline change, and by a tag."""
    ours = (folder / "ours.yaml").read_text()
    (folder / "code.yaml").write_text(ours.replace("our_choice", "our_code") + "tag: tagged\nunsafe_code: true\n")
    (folder / "safe.yaml").write_text("group: safe\ntask: [our_choice]\n")
    (folder / "inner.yaml").write_text("group: inner\ntask:\n  - our_choice\n  - task: our_code\n    num_fewshot: 1\n")
    (folder / "outer.yaml").write_text("group: outer\ntask: [our_choice, inner]\n")
    check_harness(["safe", "our_choice"], folder)
    for task in ("our_code", "tagged", "inner", "outer", "our_c*"):
        with pytest.raises(ValueError, match="runs generated code outside a sandbox; score it by --task humaneval"):
            check_harness(["our_choice", task], folder)
    words = ["evaluate", "--base_model", "nowhere", "--lm_eval", "outer", "--lm_eval_path", str(folder)]
    assert main(words) == 2
    assert "lm-eval's outer runs generated code" in capsys.readouterr().err


def test_an_unknown_task_is_refused_before_the_model_is_loaded(folder):
    with pytest.raises(ValueError, match="nowhere is no folder with tasks"):
        check_harness(["our_choice"], folder / "nowhere")
