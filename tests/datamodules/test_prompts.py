"""Prompts byte for byte, against texts written out by hand, and what is supervised in them."""

from __future__ import annotations

import json

import pytest

from seedlora.datamodules.prompts import STYLES, Turn, check_turns, compose, exchange, prompt_record, render
from tests.helpers.models import make_module

HEADER = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
HEADER_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MULTI = [
    Turn("system", "Be brief."),
    Turn("user", "Hi"),
    Turn("assistant", "Hello!"),
    Turn("user", "1+1?"),
    Turn("assistant", "2"),
]


@pytest.fixture
def tokenizer(tiny_llama):
    tokenizer = make_module(tiny_llama).tokenizer
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.mark.parametrize(
    ("style", "turns", "text", "said"),
    [
        ("plain", exchange("1+1=", "2"), "1+1=\n2", ["2"]),
        ("alpaca", exchange("Say\nhi.", "hi"), f"{HEADER}\n\n### Instruction:\nSay\nhi.\n\n### Response:hi", ["hi"]),
        (
            "alpaca",
            exchange("Add.", "3", "1 2"),
            f"{HEADER_INPUT}\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:3",
            ["3"],
        ),
        (
            "alpaca_split",
            exchange("Add.\n1\n2", "3"),
            f"{HEADER_INPUT}\n\n### Instruction:\nAdd.\n\n### Input:\n1\n2\n\n### Response:3",
            ["3"],
        ),
        ("alpaca_split", exchange("Add.\n", "3"), f"{HEADER}\n\n### Instruction:\nAdd.\n\n### Response:3", ["3"]),
        (
            "alpaca",
            MULTI,
            "Be brief.\n\n### Instruction:\nHi\n\n### Response:Hello!<eos>\n\n### Instruction:\n1+1?\n\n### Response:2",
            ["Hello!<eos>", "2"],
        ),
        (
            "tulu",
            MULTI,
            "<|system|>\nBe brief.\n<|user|>\nHi\n<|assistant|>\nHello!<eos>\n<|user|>\n1+1?\n<|assistant|>\n2",
            ["Hello!<eos>", "2"],
        ),
        ("tulu", exchange("Hi", "{content}"), "<|user|>\nHi\n<|assistant|>\n{content}", ["{content}"]),
        ("tulu", exchange("{input}", "x", "{content}"), "<|user|>\n{input}\n{content}\n<|assistant|>\nx", ["x"]),
        (
            "chat",
            MULTI,
            "<|system|>Be brief.<eos>\n<|user|>Hi<eos>\n<|assistant|>Hello!<eos>\n<|user|>1+1?<eos>\n<|assistant|>2",
            ["Hello!<eos>", "2"],
        ),
    ],
)  # fmt: skip
def test_texts_and_what_is_supervised(tokenizer, style, turns, text, said):
    composed = compose(prompt_record(style, tokenizer), turns)
    assert composed.text == text
    assert [composed.text[begin:end] for begin, end in composed.spans] == said


def test_llm_adapters_has_the_spaces_of_its_source_and_trains_on_all(tokenizer):
    record = prompt_record("llm_adapters", tokenizer)
    text = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n"
        "\n"
        "                ### Instruction:\n"
        "                Is it?\n"
        "                \n"
        "                ### Response:\n"
        "                the correct answer is true"
    )
    composed = compose(record, exchange("Is it?", "the correct answer is true"))
    assert composed.text == text
    assert composed.spans == [(0, len(text))]
    assert compose(record, exchange("a", "b", "c")).text == (
        f"{HEADER_INPUT} \n\n                ### Instruction:\n                a\n                \n"
        "                ### Input:\n                c\n                \n                ### Response:\n"
        "                b"
    )


@pytest.mark.parametrize("style", [*STYLES, "chat"])
def test_a_record_from_json_prompts_exactly_as_training_did(tokenizer, style):
    record = json.loads(json.dumps(prompt_record(style, tokenizer)))
    for turns in (exchange("What\nis it?", "It."), MULTI):
        text = compose(record, turns).text
        assert text == render(record, turns[:-1]) + turns[-1].content
    if style != "chat":
        assert render(style, "What\nis it?") == render(record, "What\nis it?")


def test_a_chat_template_that_rewrites_the_past_is_refused(tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE.replace("{{ m.content }}", "{{ loop.length }}{{ m.content }}")
    with pytest.raises(ValueError, match="differently once it goes on"):
        compose(prompt_record("chat", tokenizer), MULTI)


def test_a_chat_template_that_raises_is_one_sentence(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="refuses this conversation: roles must alternate"):
        compose(prompt_record("chat", tokenizer), MULTI)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([Turn("assistant", "Hi")], "starts with the assistant"),
        ([Turn("system", "s"), Turn("assistant", "Hi")], "starts with the assistant"),
        ([Turn("user", "Hi")], "no assistant turn"),
        ([], "no assistant turn"),
        ([Turn("human", "Hi"), Turn("assistant", "x")], "turn 1 has the role 'human'; roles are system"),
        ([Turn("user", "Hi"), Turn("system", "x")], "turn 2 is a system turn"),
    ],
)  # fmt: skip
def test_turns_that_are_no_conversation_are_refused(turns, message):
    with pytest.raises(ValueError, match=message):
        check_turns(turns)


def test_what_nobody_answers_is_left_out():
    assert check_turns([*MULTI, Turn("user", "And?")]) == tuple(MULTI)


@pytest.mark.parametrize(
    ("style", "change", "message"),
    [
        ("fancy", {}, "Unknown prompt style 'fancy'; choose one of alpaca, alpaca_split, chat, llm_ad"),
        ("plain", {"eos_token": None}, "no end token"),
        ("chat", {"chat_template": None}, "no chat template; choose one of plain, alpaca"),
    ],
)  # fmt: skip
def test_a_style_that_cannot_be_recorded_is_refused(tokenizer, style, change, message):
    for name, value in change.items():
        setattr(tokenizer, name, value)
    with pytest.raises(ValueError, match=message):
        prompt_record(style, tokenizer)
