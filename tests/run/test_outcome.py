"""The outcome of a test, and its record."""

from __future__ import annotations

import json

import torch

from seedlora.run.outcome import Outcome
from seedlora.scores.row_scores import RowScores


class Rows(dict):
    """A test split that says which of its rows were taken."""

    def take(self, rows):
        return Rows(rows=rows.tolist())

    def sha256(self):
        return str(self["rows"])


class Data:
    def __init__(self):
        self.rows = {"test": Rows()}

    def domains(self, split):
        return {"kind": [f"{split} {i}" for i in range(9)]}


def test_the_outcome_of_a_test():
    items = torch.tensor([1, 2, 5])
    correct = torch.tensor([[True, False, True], [True, True, False], [False, True, True]])
    outcome = Outcome.of_test(("base", "seed_1", "fused"), correct, items)
    (batch,) = outcome.numbered_after([{"items": torch.tensor([0, 4, -1]), "labels": "kept"}])
    assert (batch["items"].tolist(), batch["labels"]) == ([6, 10, -1], "kept")
    alone = outcome.results(["seed_1"])
    assert "train_sample" not in outcome.record(alone, object())
    scores = RowScores(torch.ones(5), torch.tensor([True, True, False, True, True]), torch.full((5,), 2))
    outcome.train = dict.fromkeys(("base", "seed_1", "fused"), scores[3:])
    outcome.add({"ties": scores})
    found = outcome.results(["seed_1"])
    # the fused adapter last
    assert found.items == {"base": "110", "seed_1": "011", "ties": "110", "fused": "101"}
    record = outcome.record(found, Data())
    json.dumps(record)
    assert record["domains"] == {"kind": ["test 1", "test 2", "test 5"]}
    assert record["items_sha256"] == "[1, 2, 5]"
    assert list(record["train_sample"]["losses"]) == ["base", "seed_1", "ties", "fused"]
    assert record["train_sample"]["rows"] == 2
    assert outcome.record(found, object())["domains"] == {}
