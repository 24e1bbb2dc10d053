"""Rows, masks, orders and splits."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from seedlora.datamodules.prompts import exchange, prompt_record
from seedlora.datamodules.rows import tokenise
from seedlora.datamodules.sampler import ReplicaSampler
from tests.helpers.models import EOS, make_data, make_module


@pytest.fixture
def tokenizer(tiny_llama):
    return make_module(tiny_llama).tokenizer


@pytest.fixture
def data(tokenizer):
    module = make_data()
    module.tokenizer = tokenizer
    module.setup("fit")
    return module


def tokens(conversations, tokenizer, *, style, max_length, **options):
    return tokenise(conversations, tokenizer, record=prompt_record(style, tokenizer), max_length=max_length, **options)


def test_the_response_and_the_end_token_are_supervised_and_nothing_else(tokenizer):
    rows = tokens([exchange("1+1=", "2"), exchange("ab", "cde")], tokenizer, style="plain", max_length=64)
    ids, labels = rows.padded([0, 1])
    eos = tokenizer.eos_token_id
    assert tokenizer.decode(ids[1]) == "ab\ncde<eos>"
    said = [[i for i in row if i != -100] for row in labels.tolist()]
    assert said == [[*tokenizer("2")["input_ids"], eos], [*tokenizer("cde")["input_ids"], eos]]
    assert labels[0].tolist()[:5] == [-100] * 5
    # the end token of the model is id 0, and so is the padding: only the label tells them apart
    assert ids[0].tolist()[-1] == 0 == rows.padded([0])[0][0].tolist()[-1]
    short = tokens([exchange("1", "2"), exchange("123456", "7")], tokenizer, style="plain", max_length=64)
    assert short.padded([0, 1])[1][0].tolist()[-5:] == [-100] * 5


def test_alpaca_is_byte_exact(tokenizer):
    rows = tokens([exchange("Say hi.", "hi")], tokenizer, style="alpaca", max_length=512)
    assert tokenizer.decode(rows.padded([0])[0][0]) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nSay hi.\n\n### Response:hi<eos>"
    )


def merging_tokenizer():
    """One that begins with a bos and merges ``:h``, the last of Alpaca's prompt with the first of an answer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([EOS, "<s>", *alphabet, ":h", "hi"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[(":", "h"), ("h", "i")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, bos_token="<s>")


def test_a_token_that_holds_the_end_of_the_prompt_and_the_begin_of_the_answer_is_supervised():
    """The prompt alone has as many tokens as prompt and ``:h`` together: a mask of its length would miss that one."""
    tokenizer = merging_tokenizer()
    prompt = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nSay hi.\n\n### Response:"
    )
    rows = tokens([exchange("Say hi.", "hi, hi")], tokenizer, style="alpaca", max_length=512)
    ids, labels = (tensor[0].tolist() for tensor in rows.padded([0]))
    said = tokenizer.convert_tokens_to_ids([":h", "i", ",", "Ġ", "hi", EOS])
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-6:] == said
    # one bos, one token a byte but for "hi" in the instruction, and the colon is in the token that is supervised
    assert labels == [-100] * (1 + len(prompt) - 1 - 1) + said
    assert len(tokenizer(prompt)["input_ids"]) == len(labels) - len(said) + 1


def test_long_rows_are_cut_and_counted_and_dropped_without_a_supervised_token(tokenizer):
    examples = [exchange("a", "b" * 20), exchange("a" * 20, "b"), exchange("a", "b")]
    rows = tokens(examples, tokenizer, style="plain", max_length=10)
    assert (len(rows), rows.counts.cut, rows.counts.unsupervised) == (2, 1, 1)
    assert rows.lengths.tolist() == [10, 4]


def sets_per_step(data, seeds, seed, *, accumulate, world_size, epoch=3):
    samplers = [
        ReplicaSampler(
            data.rows["train"], seeds=seeds, batch_size=2, accumulate=accumulate, rank=rank, world_size=world_size,
            epoch=epoch,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    steps = [[] for _ in range(samplers[0].steps)]
    for sampler in samplers:
        for i, micro in enumerate(sampler):
            steps[i // accumulate].extend(micro.rows[seeds.index(seed)])
    return [sorted(step) for step in steps]


@pytest.mark.parametrize(("n", "wanted"), [(7, 7), (99, 24)])
def test_the_sample_of_training_rows_is_the_same_on_one_rank_and_on_two(data, monkeypatch, n, wanted):
    def rows(ranks):
        found, shares = [], []
        for rank in range(ranks):
            monkeypatch.setattr(data, "trainer", SimpleNamespace(global_rank=rank, world_size=ranks))
            batches = list(data.train_sample(n))
            shares.append(sum(len(batch["items"]) for batch in batches))
            found += [
                tuple(ids[: int(labels.ne(-100).nonzero().max()) + 1].tolist())
                for batch in batches
                for ids, labels, item in zip(batch["input_ids"], batch["labels"], batch["items"], strict=True)
                if item >= 0
            ]
        assert len(set(shares)) == 1, "a rank with a forward more would wait"
        return sorted(found)

    assert len(alone := rows(1)) == wanted
    assert alone == rows(2)
    train = data.rows["train"]
    assert {*alone} <= {tuple(train.row(i)[0].tolist()) for i in range(len(train))}
    assert len({*alone}) > 1


def test_the_order_of_a_seed_is_the_same_alone_stacked_and_on_two_ranks(data):
    alone = sets_per_step(data, [42], 42, accumulate=4, world_size=1)
    assert alone == sets_per_step(data, [1, 2, 42, 3, 4], 42, accumulate=4, world_size=1)
    assert alone == sets_per_step(data, [11, 42], 42, accumulate=2, world_size=2)
    assert alone != sets_per_step(data, [11, 42], 11, accumulate=4, world_size=1)
    assert alone != sets_per_step(data, [42], 42, accumulate=4, world_size=1, epoch=4)
    assert sorted(row for step in alone for row in step) == list(range(24))


def test_num_items_counts_the_supervised_tokens_of_the_whole_step(data):
    sampler = ReplicaSampler(data.rows["train"], seeds=[1, 2], batch_size=2, accumulate=3, rank=1, world_size=2)
    counts = data.rows["train"].num_items
    for i, micro in enumerate(sampler):
        step = [sampler.order(seed, i // 3) for seed in (1, 2)]
        assert micro.num_items == tuple(int(counts[rows].sum()) for rows in step)
        assert all(set(rows) <= set(all_rows) for rows, all_rows in zip(micro.rows, step, strict=True))


def test_a_loader_goes_on_where_its_state_says(data):
    data.seeds = (1, 2)
    whole = [micro["input_ids"].tolist() for micro in data.train_dataloader()]
    loader = data.train_dataloader()
    iterator = iter(loader)
    for _ in range(5):
        next(iterator)
    resumed = data.train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    assert [micro["input_ids"].tolist() for micro in resumed] == whole[5:]
    resumed.sampler.set_epoch(1)
    assert len(list(resumed)) == len(whole)


def test_splits_are_disjoint_by_question_and_the_same_every_time(tokenizer):
    options = {"num_train": 60, "num_val": 10, "num_test": 20, "task_options": {"max_terms": 2, "max_digits": 1}}
    one, two = (make_data(**options) for _ in range(2))
    splits = one.items
    assert splits == two.items
    questions = [item["question"] for split in splits.values() for item in split]
    assert len(questions) == len(set(questions)) == 90
    assert make_data(**options, data_seed=2).items["test"] != splits["test"]


def test_too_few_questions_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="new questions in"):
        make_data(num_train=5000, task_options={"max_terms": 2, "max_digits": 1}).read("train").__next__()


def test_a_tokenizer_without_an_end_token_is_refused(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end token"):
        tokens([exchange("a", "b")], tokenizer, style="plain", max_length=8)


def test_lengths_are_sorted_within_a_step(data):
    lengths = data.rows["train"].lengths
    sampler = ReplicaSampler(data.rows["train"], seeds=[1], batch_size=24)
    (micro,) = sampler
    assert (np.diff(lengths[list(micro.rows[0])]) >= 0).all()


def test_tokens_seen_are_those_of_the_steps_over_the_epochs(data):
    rows = data.rows["train"]
    sampler = ReplicaSampler(rows, seeds=[1], batch_size=2, accumulate=3)
    taken = []
    for epoch, steps in ((0, 3), (1, 3), (2, 1)):
        sampler.set_epoch(epoch)
        taken += [row for step in range(steps) for micro in sampler.micro_batches(step) for row in micro.rows[0]]
    assert len(taken) == 7 * 6
    wanted = rows.lengths[taken].sum(), rows.num_items[taken].sum()
    assert sampler.seen(1, 7, steps_per_epoch=3) == wanted


def test_the_hash_of_rows_is_of_what_is_trained_on(tokenizer):
    ends = [
        tokens([exchange("a b", response)], tokenizer, style="plain", max_length=50) for response in ("c", "d", "c")
    ]
    assert ends[0].sha256() == ends[2].sha256() != ends[1].sha256()
    both = tokens([exchange("a b", "c"), exchange("a b", "d")], tokenizer, style="plain", max_length=50)
    assert both.take(np.array([1, 0])).sha256() != both.sha256()
    assert both.take(np.array([0])).sha256() == ends[0].sha256()
