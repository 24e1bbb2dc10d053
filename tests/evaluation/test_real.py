"""The whole road with the real small model: trained briefly on word problems, scored on the first 100 items of GSM8K.

SmolLM2-135M scores near zero there; the point is that every step is real: data, training, merge, prompts, generation,
extraction, statistics.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from seedlora.cli.train import main

THINGS = ("apples", "books", "coins", "marbles", "stickers", "tickets")
NAMES = ("Ana", "Ben", "Carla", "Deniz", "Emeka", "Farah")


def word_problem(rng: random.Random) -> dict[str, str]:
    """A problem of two steps with a worked solution that ends as MetaMathQA's do."""
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    boxes, each, given = rng.randint(2, 9), rng.randint(2, 12), rng.randint(1, 4)
    total, left = boxes * each, boxes * each - given
    return {
        "prompt": f"{name} has {boxes} boxes with {each} {things} each and gives away {given} {things}. "
        f"How many {things} does {name} have left?",
        "response": f"{name} has {boxes} * {each} = {total} {things}.\nAfter giving away {given}, {name} has "
        f"{total} - {given} = {left} {things} left.\n#### {left}\nThe answer is: {left}",
    }


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_smollm2_is_trained_and_scored_on_gsm8k(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    Path("rows.jsonl").write_text("".join(json.dumps(word_problem(rng)) + "\n" for _ in range(320)))
    words = ["--data", "InstructionData", "--data.path", "rows.jsonl", "--data.test_fraction", "0.05"]
    words += ["--ensemble.seeds", "[1,2]", "--ensemble.dirpath", "run", "--trainer.max_epochs", "2"]
    # Answers like those of training fit into 80 tokens; the protocol's 512 would only let the base model talk.
    words += ["--evaluate", "gsm8k", "--evaluate.limit", "100", "--evaluate.max_new_tokens", "80"]
    assert main(words) == 0
    print(capsys.readouterr().out)
    task = json.loads(Path("run/evaluation/results.json").read_text())["tasks"]["gsm8k"]
    assert {name: score["n"] for name, score in task["scores"].items()} == dict.fromkeys(task["scores"], 100)
    assert list(task["scores"]) == ["base", "seed_1", "seed_2", "soup", "fused"]
    assert (task["max_new_tokens"], task["protocol_max_new_tokens"]) == (80, 512)
    # What was learnt in training shows: the marker, and the end.
    silent = {name: counts.get("no 'The answer is: '", 0) for name, counts in task["quirks"].items()}
    assert silent["base"] > 80
    assert silent["fused"] < 50
    assert task["unfinished"]["fused"] < task["unfinished"]["base"]
