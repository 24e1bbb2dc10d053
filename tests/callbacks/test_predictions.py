"""``Trainer.predict`` answers the test rows as PEFT and transformers do."""

from __future__ import annotations

import json

import lightning.pytorch as pl
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from seedlora.callbacks import SeedEnsembleCallback
from tests.helpers.models import FULL, make_data, make_module
from tests.helpers.training import make_trainer


@pytest.fixture(scope="module")
def trained(tiny_llama, tmp_path_factory):
    """Callback, module and data of a run; a high rate makes its adapters say different things."""
    callback = SeedEnsembleCallback([1, 2], dirpath=tmp_path_factory.mktemp("predict") / "x", budget="full")
    module, data = make_module(tiny_llama, learning_rate=0.05), make_data()
    make_trainer(callback, max_epochs=1).fit(module, datamodule=data)
    callback.predictions.max_new_tokens = 6
    return callback, module, data


def predict(trained, adapter=None):
    callback, module, data = trained
    callback.predictions.adapter = adapter
    batches = make_trainer(callback).predict(module, datamodule=data)
    return [answer for batch in batches for answer in batch]


def generated(model, ids):
    with torch.no_grad():
        said = model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
        )
    return said[0, len(ids) :]


@pytest.mark.parametrize("adapter", [None, "seed_2", "soup", "base"])
def test_the_answers_are_those_of_transformers(trained, tiny_llama, adapter):
    callback, module, data = trained
    answers = predict(trained, adapter)
    name = adapter or callback.ensemble.advice["folder"]
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model = plain if name == "base" else PeftModel.from_pretrained(plain, callback.dirpath / name)
    assert [answer["item"] for answer in answers] == [*range(12)]
    assert {answer["adapter"] for answer in answers} == {name}
    for answer in answers:
        ids, supervised = data.rows["test"].row(answer["item"])
        decode = module.tokenizer.decode
        assert answer["prompt"] == decode(ids[~supervised])
        assert answer["expected"] == decode(ids[supervised], skip_special_tokens=True)
        assert answer["answer"] == decode(generated(model, ids[~supervised].tolist()), skip_special_tokens=True)


def test_the_answers_are_kept(trained):
    answers = predict(trained, "fused")
    kept = (trained[0].dirpath / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert list(map(json.loads, kept)) == answers


def test_another_process_answers_the_same(trained, tiny_llama):
    callback = SeedEnsembleCallback([1, 2], dirpath=trained[0].dirpath, budget="full")
    callback.predictions.max_new_tokens = 6
    assert predict((callback, make_module(tiny_llama), make_data()), "seed_1") == predict(trained, "seed_1")


def test_an_adapter_that_is_not_there_is_named(trained):
    with pytest.raises(
        ValueError, match="has no adapter 'sedd_1' to predict with; it has base, seed_1, seed_2, soup, f"
    ):
        predict(trained, "sedd_1")


def test_without_the_callback_nobody_answers(trained):
    _, module, data = trained
    with pytest.raises(ValueError, match="give the Trainer the run's SeedEnsembleCallback"):
        make_trainer(pl.Callback()).predict(module, datamodule=data)


def test_whole_models_are_asked_by_generate(tiny_llama, tmp_path):
    callback = SeedEnsembleCallback([1], dirpath=tmp_path / "x")
    with pytest.raises(ValueError, match="trains whole models; use python -m seedlora generate"):
        make_trainer(callback).predict(make_module(tiny_llama, **FULL), datamodule=make_data())


def test_rows_whose_prompt_is_trained_on_cannot_be_asked(trained, tiny_llama):
    data = make_data(style="llm_adapters")
    with pytest.raises(ValueError, match="the style llm_adapters trains on prompts too"):
        predict((trained[0], trained[1], data), "base")


def test_the_last_answer_of_a_chat_is_asked_for(tiny_llama, tmp_path):
    from seedlora.datamodules import InstructionData

    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 4)
    data = InstructionData(tmp_path / "rows.jsonl", style="plain", test_fraction=0.25, val_fraction=0.0)
    data.tokenizer = make_module(tiny_llama).tokenizer
    data.setup()
    ((row,),) = data.predict_dataloader()
    decode = data.tokenizer.decode
    assert decode(row.prompt).replace("\n", "").startswith("ab")
    assert decode(row.prompt).rstrip().endswith("c")
    assert decode(row.answer, skip_special_tokens=True) == "d"
