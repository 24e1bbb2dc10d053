"""``samples.jsonl`` says what the scoring has seen of each row."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel

from seedlora.callbacks import SeedEnsembleCallback
from tests.helpers.models import make_data, make_module
from tests.helpers.precision import plain_model
from tests.helpers.training import make_trainer


@pytest.fixture(scope="module")
def tested(tiny_llama, tmp_path_factory):
    """A callback after its test, and the data; sums of one digit are learnt in part."""
    options = {"budget": "full", "compare": "ties", "controls": "untrained", "ema": 0.9}
    callback = SeedEnsembleCallback([1, 2], dirpath=tmp_path_factory.mktemp("samples") / "x", **options)
    module, data = make_module(tiny_llama, learning_rate=0.02), make_data()
    trainer = make_trainer(callback, max_epochs=3)
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    return callback, data


def samples_of(callback):
    return [json.loads(line) for line in (callback.dirpath / "samples.jsonl").read_text().splitlines()]


def test_each_row_is_there_with_its_text(tested):
    callback, data = tested
    samples, decode = samples_of(callback), data.tokenizer.decode
    assert [sample["item"] for sample in samples] == [*range(12)]
    for sample in samples:
        ids, supervised = data.rows["test"].row(sample["item"])
        assert (sample["prompt"], sample["expected"]) == (decode(ids[~supervised]), decode(ids[supervised]))


def test_what_is_right_is_what_the_scores_count(tested):
    samples, items = samples_of(tested[0]), tested[0].results.items
    compared = {"seed_1_ema", "ema_soup", "gain_seed", "gain_soup", "greedy_soup", "ties"}
    assert {"base", "seed_1", "seed_2", "soup", "fused", *compared} <= {*samples[0]["right"]} == items.keys()
    for label, digits in items.items():
        assert "".join("01"[sample["right"][label]] for sample in samples) == digits
        for sample in samples:
            assert sample["right"][label] == (sample["forced"][label] == sample["expected"])


@pytest.mark.parametrize("name", ["base", "seed_2", "seed_2_ema", "soup", "fused"])
def test_the_forced_tokens_are_those_of_peft(tested, tiny_llama, name):
    callback, data = tested
    plain = plain_model(tiny_llama)
    model = plain if name == "base" else PeftModel.from_pretrained(plain, callback.dirpath / name)
    for sample in samples_of(callback):
        ids, supervised = data.rows["test"].row(sample["item"])
        with torch.no_grad():
            likely = model(input_ids=torch.tensor(ids[None].astype("int64"))).logits[0].argmax(-1)
        assert sample["forced"][name] == data.tokenizer.decode(likely[:-1][torch.from_numpy(supervised[1:].copy())])
