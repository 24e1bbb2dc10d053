"""Own files for validation and test, and several data sets in one epoch."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from seedlora.datamodules import InstructionData


@pytest.fixture
def load(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("SEEDLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name, n in (("a", 10), ("b", 6), ("c", 4), ("val", 3), ("test", 2)):
        lines = [json.dumps({"prompt": f"{name}{i}", "response": "x" * (i + 1)}) for i in range(n)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))

    def load(**options):
        data = InstructionData("a.jsonl", style="plain", **options)
        data.tokenizer = tokenizer
        data.setup()
        return data

    return load


def texts(data, split):
    rows = data.rows[split]
    return [data.tokenizer.decode(rows.row(i)[0]).partition("\n")[0] for i in range(len(rows))]


def test_files_of_their_own_are_the_splits_and_nothing_is_set_aside(load):
    data = load(val_path="val.jsonl", test_path="test.jsonl")
    assert texts(data, "train") == [f"a{i}" for i in range(10)]
    assert texts(data, "val") == ["val0", "val1", "val2"]
    assert texts(data, "test") == ["test0", "test1"]
    assert set(data.counts) == {"", "val_path", "test_path"}
    half = load(val_path="val.jsonl", test_fraction=0.5)
    assert [len(half.rows[split]) for split in ("train", "val", "test")] == [5, 3, 5]
    with pytest.raises(ValueError, match=r"val_path 'no.jsonl' is no file or folder"):
        load(val_path="no.jsonl")


def test_each_row_is_in_an_epoch_as_often_as_its_weight_says(load):
    mix = {"b.jsonl": 2, "c.jsonl": 0.5}
    data = load(mix=mix, val_fraction=0, test_fraction=0)
    counts = Counter(texts(data, "train"))
    assert {text: n for text, n in counts.items() if text[0] != "c"} == {f"a{i}": 1 for i in range(10)} | {
        f"b{i}": 2 for i in range(6)
    }
    assert sorted(n for text, n in counts.items() if text[0] == "c") == [1, 1]
    again = load(mix=mix, val_fraction=0, test_fraction=0)
    assert again.rows["train"].sha256() == data.rows["train"].sha256()
    assert len(load(mix=mix, num_train=5, val_fraction=0, test_fraction=0).rows["train"]) == 5


def test_rows_set_aside_are_not_trained_on_however_often_they_would_be_taken(load):
    data = load(mix={"b.jsonl": 3}, val_fraction=0.25, test_fraction=0.25)
    train, val, test = (set(texts(data, split)) for split in ("train", "val", "test"))
    assert (len(val), len(test), len(train)) == (4, 4, 8)
    assert not train & val
    assert not train & test


def test_each_row_that_is_set_aside_knows_its_data_set(load):
    data = load(mix={"b.jsonl": 3, "c.jsonl": 1}, val_fraction=0.25, test_fraction=0.5)
    for split in ("val", "test"):
        assert data.domains(split) == {"data set": [f"{text[0]}.jsonl" for text in texts(data, split)]}
    assert set(data.domains("test")["data set"]) == {"a.jsonl", "b.jsonl", "c.jsonl"}
    assert load(test_fraction=0.5).domains("test") == {}
    assert load(mix={"b.jsonl": 1}, test_path="test.jsonl").domains("test") == {}


@pytest.mark.parametrize("weight", [0, -1, float("inf"), True])
def test_a_weight_that_takes_nothing_is_refused(load, weight):
    with pytest.raises(ValueError, match=r"mix gives b.jsonl the weight .*; a weight says how often"):
        load(mix={"b.jsonl": weight})
