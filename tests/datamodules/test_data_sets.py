"""Data sets from small files with exactly their fields: rows, splits, cache, and bad data."""

from __future__ import annotations

import json
import multiprocessing
import time
from types import SimpleNamespace

import datasets
import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from seedlora import datamodules
from seedlora.datamodules import (
    GSM8K,
    CodeFeedback,
    Commonsense170k,
    InstructionData,
    InstructionDataModule,
    MetaMathQA,
    TableDataModule,
    Tulu,
)
from seedlora.datamodules.cache import cached_rows
from seedlora.datamodules.rows import Counts, empty_chunk
from tests.helpers.models import make_module

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n"
)
CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Bye!"},
]
EXACT = [
    (
        MetaMathQA,
        {"type": "x", "original_question": "1+1?", "query": "What is\n1+1?", "response": "#### 2\nThe answer is: 2"},
        ALPACA + "What is\n1+1?\n\n### Response:[#### 2\nThe answer is: 2<eos>]",
    ),
    (
        CodeFeedback,
        {"query": "Sort.", "answer": "sorted(x)", "resource": "evol_instruct", "lang": "python"},
        ALPACA + "Sort.\n\n### Response:[sorted(x)<eos>]",
    ),
    (
        lambda path: CodeFeedback(path, multi_turn=True),
        {"id": 7, "messages": CHAT},
        ALPACA + "Hi\n\n### Response:[Yes?<eos>]\n\n### Instruction:\nBye\n\n### Response:[Bye!<eos>]",
    ),
    (
        Tulu,
        {"dataset": "flan", "id": "f1", "messages": [{"role": "system", "content": "Be kind."}, *CHAT]},
        "<|system|>\nBe kind.\n<|user|>\nHi\n<|assistant|>\n[Yes?<eos>]\n<|user|>\nBye\n<|assistant|>\n[Bye!<eos>]",
    ),
    (
        GSM8K,
        {"question": "1+1?", "answer": "1+1 = <<1+1=2>>2\n#### 2"},
        ALPACA + "1+1?\n\n### Response:[1+1 = <<1+1=2>>2\n#### 2\nThe answer is: 2<eos>]",
    ),
    (
        Commonsense170k,
        {"instruction": "Is it?", "input": "", "output": "the correct answer is true", "answer": "true"},
        # all but the first token, which nothing predicts
        "B[elow is an instruction that describes a task. Write a response that appropriately completes the request.  \n"
        "\n                ### Instruction:\n                Is it?\n                \n"
        "                ### Response:\n                the correct answer is true<eos>]",
    ),
    (InstructionData, {"prompt": "Hi", "response": "Yo"}, ALPACA + "Hi\n\n### Response:[Yo<eos>]"),
    (InstructionData, {"messages": CHAT[:2]}, ALPACA + "Hi\n\n### Response:[Yes?<eos>]"),
    (InstructionData, {"instruction": "Hi", "output": "Yo"}, ALPACA + "Hi\n\n### Response:[Yo<eos>]"),
]  # fmt: skip


@pytest.fixture
def tokenizer(tiny_llama):
    return make_module(tiny_llama).tokenizer


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEEDLORA_CACHE", str(tmp_path / "cache"))


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def made(data, tokenizer):
    data.tokenizer = tokenizer
    data.setup("fit")
    return data


def shown(rows, tokenizer, row=0):
    """The text of a row with what is supervised in brackets."""
    ids, supervised = rows.row(row)
    text, before = "", False
    for token, said in zip([*ids, None], [*supervised, False], strict=True):
        text += "" if said == before else "[" if said else "]"
        text, before = text + ("" if token is None else tokenizer.decode([int(token)])), said
    return text


@pytest.mark.parametrize(("make", "row", "expected"), EXACT)
def test_every_data_set_byte_for_byte(tmp_path, tokenizer, make, row, expected):
    data = made(make(write(tmp_path / "rows.jsonl", [row])), tokenizer)
    assert shown(data.rows["train"], tokenizer) == expected


def test_every_data_set_has_an_exact_row():
    kinds = {*datamodules.all_data_modules()}
    tested = {InstructionData, MetaMathQA, CodeFeedback, Tulu, GSM8K, Commonsense170k}
    others = {InstructionDataModule, TableDataModule, datamodules.ReasoningGym, datamodules.StackData}
    assert kinds - tested == others


def rows_of(n):
    return [{"query": f"{i}+{i}?", "response": f"{2 * i}"} for i in range(n)]


def test_all_formats_give_the_same_rows(tmp_path, tokenizer):
    rows = rows_of(5)
    write(tmp_path / "a.jsonl", rows)
    write(tmp_path / "lines.json", rows)
    (tmp_path / "b.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(rows, indent=2).encode())
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    for name in ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"):
        (tmp_path / "mirror" / "data").mkdir(parents=True, exist_ok=True)
        part = rows[:3] if "00000-" in name else rows[3:]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), tmp_path / "mirror" / name)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows[:1]), tmp_path / "mirror/data/test-00000-of-00001.parquet"
    )
    (tmp_path / "mirror" / "dataset_infos.json").write_text("{}")
    found = [
        made(MetaMathQA(str(tmp_path / name)), tokenizer).rows["train"]
        for name in ("a.jsonl", "lines.json", "b.json", "c.parquet", "mirror")
    ]
    assert len(found[0]) == 5
    for other in found[1:]:
        assert (other.tokens == found[0].tokens).all()
        assert (other.numbers == found[0].numbers).all()


def test_a_mirror_with_configurations(tmp_path, tokenizer):
    row = {"question": "1+1?", "answer": "#### 2"}
    write(tmp_path / "gsm8k/main/train.jsonl", [row] * 3)
    write(tmp_path / "gsm8k/main/test.jsonl", [row] * 5)
    write(tmp_path / "gsm8k/socratic/train.jsonl", [row] * 7)
    assert made(GSM8K(str(tmp_path / "gsm8k")), tokenizer).rows["train"].counts.read == 3


@pytest.mark.parametrize(
    "name", ["train.jsonl", "data/train-00000-of-00001.jsonl", "Training.jsonl", "my_train_set.jsonl"]
)
def test_the_training_file_of_a_folder_is_named_by_a_word(tmp_path, tokenizer, name):
    write(tmp_path / "mirror" / name, rows_of(3))
    write(tmp_path / "mirror/constraints.jsonl", rows_of(5))
    write(tmp_path / "mirror/restrained/test.jsonl", rows_of(7))
    assert made(MetaMathQA(str(tmp_path / "mirror")), tokenizer).rows["train"].counts.read == 3


def test_line_separators_in_a_text_are_no_new_lines(tmp_path, tokenizer):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a\u2028b", "response": "c\u0085"}\r\n\n', encoding="utf-8")
    assert made(InstructionData("rows.jsonl"), tokenizer).rows["train"].counts.read == 1


def test_the_hub_is_read_through_datasets(tokenizer, monkeypatch):
    asked = []

    def load_dataset(path, **options):
        asked.append((path, options))
        return datasets.Dataset.from_list(rows_of(4))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = made(MetaMathQA(revision="abc", val_fraction=0.25), tokenizer)
    assert asked == [("meta-math/MetaMathQA", {"name": None, "revision": "abc", "split": "train"})]
    assert (len(data.rows["train"]), len(data.rows["val"])) == (3, 1)


def test_no_network_is_one_sentence(tokenizer, monkeypatch):
    def load_dataset(path, **options):
        raise ConnectionError("Couldn't reach the Hub\nTraceback ...")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for address, why in ((lambda *_, **__: None, "Couldn't reach the Hub"), (load_dataset, ".* does not answer")):
        monkeypatch.setattr(huggingface_hub, "get_session", lambda head=address: SimpleNamespace(head=head))
        with pytest.raises(OSError, match=rf"MetaMathQA could not be read from the hub \({why}\); download"):
            made(MetaMathQA(), tokenizer)
        assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_splits_are_fixed_and_independent_of_tokenizer_style_and_seeds(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", rows_of(100))
    options = {"val_fraction": 0.1, "test_fraction": 0.2}
    one = made(MetaMathQA(path, **options), tokenizer)
    two = MetaMathQA(path, **options, style="plain", max_length=9, on_long_row="drop")
    two.seeds = (1, 2)
    made(two, tokenizer)
    assert {split: len(rows) for split, rows in one.rows.items()} == {"train": 70, "val": 10, "test": 20}
    numbers = [set(rows.numbers.tolist()) for rows in one.rows.values()]
    assert set.union(*numbers) == set(range(100))
    assert 0 < two.rows["train"].counts.long < 100
    for split, rows in two.rows.items():
        assert set(rows.numbers.tolist()) <= set(one.rows[split].numbers.tolist())
    other = made(MetaMathQA(path, **options, split_seed=1), tokenizer)
    assert other.rows["val"].numbers.tolist() != one.rows["val"].numbers.tolist()


def test_num_train_keeps_the_validation_split(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", rows_of(50))
    whole, part = (made(MetaMathQA(path, val_fraction=0.1, num_train=n), tokenizer) for n in (None, 8))
    assert part.rows["val"].numbers.tolist() == whole.rows["val"].numbers.tolist()
    assert len(part.rows["train"]) == 8
    assert set(part.rows["train"].numbers) <= set(whole.rows["train"].numbers)
    with pytest.raises(ValueError, match="num_train asks for 46 rows, there are 45 to train on"):
        made(MetaMathQA(path, val_fraction=0.1, num_train=46), tokenizer)


def test_rows_are_tokenised_once_and_mapped(tmp_path, tokenizer, monkeypatch):
    path = write(tmp_path / "rows.jsonl", rows_of(20))
    first = made(MetaMathQA(path), tokenizer)
    monkeypatch.setattr("seedlora.datamodules.base.tokenise_in_chunks", None)  # calling it would fail
    second = made(MetaMathQA(path, batch_size=3, val_fraction=0.5), tokenizer)
    assert isinstance(second.rows["train"].tokens, np.memmap)
    assert (second.rows["train"].tokens == first.rows["train"].tokens).all()


@pytest.mark.parametrize("change", ["content", "style", "max_length", "tokenizer", "option"])
def test_what_changes_the_rows_changes_the_cache(tmp_path, tokenizer, change):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a", "response": "b", "other": "cccc"}])
    before = made(InstructionData(path), tokenizer).rows["train"].tokens.tolist()
    shorter = len(before) - 1  # without the end token
    options = {
        "style": {"style": "plain"},
        "max_length": {"max_length": shorter},
        "option": {"response_field": "other"},
    }
    if change == "content":
        write(tmp_path / "rows.jsonl", [{"prompt": "a", "response": "c"}])
    elif change == "tokenizer":
        tokenizer.eos_token = "a"
    assert made(InstructionData(path, **options.get(change, {})), tokenizer).rows["train"].tokens.tolist() != before


def tokenise_slowly(made):
    def make():
        made.write_text("x" + (made.read_text() if made.exists() else ""))
        time.sleep(0.5)
        return [empty_chunk(Counts(read=3))]

    assert cached_rows("key", make).counts.read == 3


def test_processes_that_start_together_tokenise_once(tmp_path):
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=tokenise_slowly, args=(tmp_path / "made",)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "made").read_text() == "x"


def test_a_failure_leaves_nothing_behind(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", [*rows_of(3), {"query": "a"}])
    with pytest.raises(ValueError, match="line 4"):
        made(MetaMathQA(path), tokenizer)
    assert [file.suffix for file in (tmp_path / "cache" / "data").iterdir()] == [".lock"]


GOOD = b'{"prompt": "a", "response": "b"}\n'
BAD_ROWS = [
    (b'{"prompt": "a"}\n', "line 2: no column 'response'; its columns are prompt"),
    (b'{"prompt": "a", "response": 3}\n', "line 2: column 'response' holds a int, not text"),
    (b'{"question": "a"}\n', "line 2: neither messages or conversations, nor a request and a response"),
    (b'{"prompt": "a", \n', "line 2: not JSON"),
    (b"[1]\n", "line 2: a list, not an object"),
    (b"\xff\xfe\x00\n", "line 2: not UTF-8"),
    (b'{"messages": [{"role": "assistant", "content": "a"}]}\n', "line 2: the chat starts with the assistant"),
    (b'{"messages": [{"role": "user", "content": "a"}]}\n', "line 2: the chat has no assistant turn"),
    (b'{"messages": "a"}\n', "line 2: no list in column 'messages'"),
    (b'{"messages": [{"from": "human", "value": "a"}]}\n', "line 2: the chat has no assistant turn"),
    (b'{"instruction": "a"}\n', "line 2: no column 'output'; its columns are instruction"),
]


@pytest.mark.parametrize(("line", "message"), BAD_ROWS)
def test_a_bad_row_names_file_and_line_or_is_counted(tmp_path, tokenizer, line, message):
    (tmp_path / "rows.jsonl").write_bytes(GOOD + line + GOOD)
    with pytest.raises(ValueError, match=f"rows.jsonl, {message}"):
        made(InstructionData("rows.jsonl"), tokenizer)
    counts = made(InstructionData("rows.jsonl", on_bad_row="skip"), tokenizer).rows["train"].counts
    assert (counts.read, counts.bad) == (3, 1)
    assert message in counts.first_bad
    assert "1 unreadable (first: rows.jsonl, line 2" in counts.sentence()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b"", "InstructionData found no training rows"),
        ("rows.jsonl", b"{}\n{}\n", "2 unreadable .first: rows.jsonl, line 1: neither messages.* .none.; .* left"),
        ("rows.json", b'[{"prompt": "a"},\n {"prompt" 1}]', "rows.json, line 2 is not JSON"),
        ("rows.json", b'[{"prompt": "a", "response": "b"}', "rows.json, line 1 is not JSON"),
        ("rows.json", b'[\n"\xff"]', "rows.json, line 2 is not UTF-8"),
        ("rows.json", b"[]", "no training rows"),
        ("rows.parquet", b"PAR1 or not", "rows.parquet is not parquet"),
        ("rows.txt", b"", "holds no file of rows; give JSON"),
    ],
)  # fmt: skip
def test_bad_files_are_one_sentence(tmp_path, tokenizer, name, content, message):
    (tmp_path / "d").mkdir()
    (tmp_path / name if name != "rows.txt" else tmp_path / "d" / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        made(InstructionData(name if name != "rows.txt" else "d", on_bad_row="skip"), tokenizer)


def test_a_chat_that_its_template_refuses_is_a_bad_row(tmp_path, tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    write(tmp_path / "rows.jsonl", [{"messages": CHAT[:2]}, {"messages": [{"role": "system", "content": ""}, *CHAT]}])
    with pytest.raises(ValueError, match="line 2: the chat template refuses this conversation: no system"):
        made(InstructionData("rows.jsonl", style="chat"), tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "no.jsonl"}, "path 'no.jsonl' is no file or folder"),
        ({"on_bad_row": "hide"}, "Unknown on_bad_row 'hide'; choose one of error, skip"),
        ({"on_long_row": "hide"}, "Unknown on_long_row 'hide'; choose one of cut, drop"),
        ({"style": "fancy"}, "Unknown prompt style 'fancy'"),
        ({"val_fraction": 0.9, "test_fraction": 0.1}, "must leave rows to train on"),
        ({"num_train": 0}, "num_train must be at least 1, got 0"),
        ({"pack_tokens": 511}, "pack_tokens 511 must hold a row of max_length 512 tokens"),
    ],
)
def test_bad_options_are_refused_when_the_data_is_configured(tmp_path, options, message):
    write(tmp_path / "rows.jsonl", rows_of(1))
    with pytest.raises(ValueError, match=message):
        InstructionData(**{"path": "rows.jsonl", **options})
    with pytest.raises(ValueError, match="path is missing: this data set is on no hub"):
        Commonsense170k()
