"""Other people's data modules, wrapped: the same rows as our own readers give, and a run on them."""

from __future__ import annotations

import importlib.util
import json

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler
from transformers import DataCollatorForSeq2Seq

from seedlora.datamodules import StackData
from seedlora.datamodules.prompts import exchange, prompt_record
from seedlora.datamodules.rows import tokenise
from tests.helpers.paths import ROOT

ROWS = [{"prompt": f"{i}+{i}=", "response": str(2 * i), "id": i} for i in range(7)]


class Given(pl.LightningDataModule):
    """Gives loaders of a data set."""

    def __init__(self, dataset, **options):
        super().__init__()
        self.dataset, self.options = dataset, options

    def train_dataloader(self):
        return DataLoader(self.dataset, **self.options)


@pytest.fixture
def wanted(tokenizer):
    conversations = [exchange(row["prompt"], row["response"]) for row in ROWS]
    return tokenise(conversations, tokenizer, record=prompt_record("plain", tokenizer), max_length=64)


def wrapped(data, tokenizer, **options):
    module = StackData(data, **options)
    module.tokenizer = tokenizer
    module.setup("fit")
    return module


def token_rows(rows):
    found = []
    for i in range(len(rows)):
        ids, said = rows.row(i)
        labels = [token if scored else -100 for token, scored in zip(ids.tolist(), said, strict=True)]
        found.append({"input_ids": ids.tolist(), "labels": labels, "attention_mask": [1] * len(ids)})
    return found


class Stream(IterableDataset):
    def __iter__(self):
        return iter(ROWS)


@pytest.mark.parametrize(
    ("dataset", "options"),
    [
        (ROWS, {"batch_size": 3}),
        (ROWS, {"batch_size": 3, "shuffle": True, "drop_last": True}),
        (ROWS, {"batch_size": 2, "collate_fn": list}),
        (ROWS, {"batch_size": None, "shuffle": True}),
        (Stream(), {"batch_size": 2}),
    ],
)
def test_rows_of_any_loader_are_those_of_its_data_set_in_order(tokenizer, wanted, dataset, options):
    data = wrapped(Given(dataset, **options), tokenizer, style="plain")
    assert data.rows["train"].sha256() == wanted.sha256()
    assert data.counts["train"].unused == {"column id": 7}
    assert data.prompt_record()["style"] == "plain"


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_of_tokens_lose_their_padding_and_nothing_else(tokenizer, wanted, side):
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, side
    collate = DataCollatorForSeq2Seq(tokenizer, padding=True)
    data = wrapped(Given(token_rows(wanted), batch_size=3, collate_fn=collate), tokenizer)
    assert data.rows["train"].sha256() == wanted.sha256()
    assert data.prompt_record() == {}
    assert wrapped(Given(token_rows(wanted), collate_fn=collate), tokenizer, style="plain").prompt_record()["style"]


def test_tokens_without_labels_are_all_trained_on_and_long_ones_are_counted(tokenizer):
    rows = [{"input_ids": torch.arange(1, 2 + i)[None]} for i in range(5)]
    data = wrapped(Given(rows, batch_size=None), tokenizer, max_length=4)
    assert data.rows["train"].lengths.tolist() == [2, 3, 4, 4]
    assert data.rows["train"].num_items.tolist() == [1, 2, 3, 3]
    assert (data.counts["train"].cut, data.counts["train"].unsupervised) == (1, 1)
    assert wrapped(Given(rows, batch_size=None), tokenizer, max_length=4, on_long_row="drop").counts["train"].long == 1


def test_a_sampler_of_its_own_decides_which_rows_there_are(tokenizer):
    def numbers():
        sampler = WeightedRandomSampler([0, 0, 1, 1, 1, 0, 0], 20)
        return wrapped(Given(ROWS, sampler=sampler), tokenizer, style="plain").rows["train"].sha256()

    state = torch.get_rng_state()
    assert numbers() == numbers()
    assert torch.equal(state, torch.get_rng_state())


def test_chats_take_the_chat_template(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    data = wrapped(Given([{"messages": messages}], collate_fn=list), tokenizer)
    assert tokenizer.decode(data.rows["train"].row(0)[0]) == "<user>Hi<eos><assistant>Yo<eos>"
    assert data.prompt_record()["style"] == "chat"


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([torch.ones(2)], {}, "Given.train_dataloader gives a Tensor; StackData reads rows as dictionaries"),
        ([{"input_ids": [1], "position_ids": [0]}], {}, "gives position_ids beside input_ids, which would be lost"),
        ([{"input_ids": [1, 2], "labels": [2, 3]}], {}, "gives labels that are not the tokens at their place"),
        ([{"input_ids": [1, 2], "labels": [2]}], {}, r"gives labels of shape \(1,\) to input_ids of \(2,\)"),
        ([{"prompt": "a"}], {}, "Given, train row 1: no column 'response'"),
        ([], {}, "Given gave no training rows"),
        (ROWS, {"strict": True}, "train row 1: not used: column id; strict is true"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tokenizer, rows, options, message):
    with pytest.raises(ValueError, match=message):
        wrapped(Given(rows, batch_size=None), tokenizer, **options)


def test_the_example_trains_merges_and_scores(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("own_datamodule", ROOT / "examples" / "own_datamodule.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(tiny_llama, str(tmp_path / "run"))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["scores"]["fused"]["n"] == 10
    assert json.loads((tmp_path / "run" / "fused" / "prompt.json").read_text())["style"] == "plain"
