"""Rows, and which of their tokens are supervised."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from seedlora.datamodules.prompts import exchange, prompt_record
from seedlora.datamodules.rows import tokenise
from tests.helpers.models import EOS


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


def test_a_tokenizer_without_an_end_token_is_refused(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end token"):
        tokens([exchange("a", "b")], tokenizer, style="plain", max_length=8)


def test_the_hash_of_rows_is_of_what_is_trained_on(tokenizer):
    ends = [
        tokens([exchange("a b", response)], tokenizer, style="plain", max_length=50) for response in ("c", "d", "c")
    ]
    assert ends[0].sha256() == ends[2].sha256() != ends[1].sha256()
    both = tokens([exchange("a b", "c"), exchange("a b", "d")], tokenizer, style="plain", max_length=50)
    assert both.take(np.array([1, 0])).sha256() != both.sha256()
    assert both.take(np.array([0])).sha256() == ends[0].sha256()
