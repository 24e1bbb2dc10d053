"""A user's own rows as a task: what is asked, how near an answer is, and the loss of the right one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from seedlora.adapters.writing import write_adapter
from seedlora.cli.main import main
from seedlora.datamodules import prompts
from seedlora.evaluation.generate import StackGenerator
from seedlora.evaluation.items import load_items
from seedlora.evaluation.own_rows import Question, answer_losses, rouge_l, token_f1
from seedlora.evaluation.tasks import TASKS
from seedlora.model.loading import load_model, load_tokenizer
from tests.helpers.models import built

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Nothing."},
]
ROWS = [
    {"prompt": "Hi", "completion": "Yo there"},
    {"messages": CHAT},
    {"instruction": "A", "input": "b", "output": "c"},
]


@pytest.fixture(autouse=True)
def _file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def test_rows_of_every_form_become_questions_with_their_last_answer():
    first, chat, about = load_items("rows", path=Path("own.jsonl"))
    assert (first.request, first.gold) == ("Hi", "Yo there")
    assert [turn.role for turn in chat.request] == ["system", "user", "assistant", "user"]
    assert chat.gold == "Nothing."
    assert prompts.render("plain", about.request) == "A\nb\n"
    judge = TASKS["rows"].judge
    assert judge(" Yo there\n", first).correct
    assert not judge("yo there", first).correct


@pytest.mark.parametrize(
    ("said", "right", "f1", "rouge"),
    [
        ("Yo there", "Yo there", 1, 1),
        ("The cat sat.", "a cat", 2 / 3, 2 / 5),  # articles are no words for the first
        ("b a", "a b", 1, 1 / 2),  # without the article both say b
        ("\u03ba\u03b1\u03b9", "\u039a\u03b1\u03b9 \u03b5\u03b3\u03ce", 2 / 3, 2 / 3),
        ("", "x", 0, 0),
        ("y", "x", 0, 0),
    ],
)
def test_measures_against_a_count_by_hand(said, right, f1, rouge):
    assert token_f1(said, right) == pytest.approx(f1, abs=1e-4)
    assert rouge_l(said, right) == pytest.approx(rouge, abs=1e-4)


def test_the_loss_is_that_of_the_models_own_forward(tiny_llama):
    model, tokenizer = load_model(tiny_llama, dtype=torch.float32), load_tokenizer(tiny_llama)
    generator = StackGenerator(model, tokenizer, route=lambda _: None, adapters={"base": None}, batch_size=2)
    pairs = (("Hi", "Yo"), ("1", "234"), ("a", "b"))
    questions = [Question((prompts.Turn("user", text),), answer) for text, answer in pairs]
    found = answer_losses(generator, "base", "plain", questions)
    for question, loss in zip(questions, found, strict=True):
        asked = tokenizer(f"{question.turns[0].content}\n")["input_ids"]
        said = [*tokenizer(question.answer)["input_ids"], tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(asked) + said])
        with torch.no_grad():
            mean = model(input_ids=torch.tensor([asked + said]), labels=labels).loss.item()
        assert loss.tokens == len(said)
        assert loss.total / loss.tokens == pytest.approx(mean, rel=1e-5)


def test_own_rows_are_scored_end_to_end(tiny_llama, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    module = built(tiny_llama, 1, 2)
    for replica in module.replicas:
        folder = Path(replica.name)
        write_adapter(folder, module.stack.stored_factors(replica.name), module.options.lora_config())
        (folder / "prompt.json").write_text(json.dumps(prompts.prompt_record("plain", module.tokenizer)))
    words = ["--adapter", "seed_1", "--adapter", "seed_2", "--with_base", "--dtype", "float32", "--max_new_tokens", "4"]
    assert main(["evaluate", *words, "--task", "rows", "--task_path", "own.jsonl"]) == 0
    task = json.loads(Path("evaluation/results.json").read_text())["tasks"]["rows"]
    assert list(task["measures"]) == ["token F1", "ROUGE-L"]
    assert task["measures"]["ROUGE-L"]["seed_1"]["n"] == 3
    assert set(task["loss"]) == {"base", "seed_1", "seed_2"}
    assert len(set(task["loss"].values())) == 3
    shown = " ".join(capsys.readouterr().out.split())
    assert all(f"{loss:.4f}" in shown for loss in task["loss"].values())


def test_a_path_alone_needs_a_single_task(tiny_llama, capsys):
    assert main(["evaluate", "--base_model", tiny_llama, "--task", "rows,gsm8k", "--task_path", "own.jsonl"]) == 2
    assert "--task_path 'own.jsonl' must be TASK=PATH where there is more than one task" in capsys.readouterr().err
    assert main(["evaluate", "--base_model", tiny_llama, "--task", "rows"]) == 2
    assert "task rows needs its test file" in capsys.readouterr().err
