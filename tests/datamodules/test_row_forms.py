"""Rows in the forms of well-known data sets: what is trained on, byte for byte, and what is said to be unused."""

from __future__ import annotations

import json

import pytest

from seedlora.datamodules import InstructionData
from seedlora.datamodules.conversations import check_turns
from seedlora.datamodules.row_forms import Columns, conversation_of

CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "FIRST"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "SECOND"},
]
TEMPLATE = (
    "{% for t in tools or [] %}<tool>{{ (t.function or t).name }}\n{% endfor %}"
    "{% for m in messages %}<|{{ m.role }}|>{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
    "{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def load(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("SEEDLORA_CACHE", str(tmp_path / "cache"))
    tokenizer.chat_template = TEMPLATE

    def load(row, **options):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(each) + "\n" for each in ([row] if isinstance(row, dict) else row)))
        data = InstructionData(str(file), val_fraction=0, test_fraction=0, **options)
        data.tokenizer = tokenizer
        data.setup()
        return data

    return load


def text_of(data, row=0):
    """The text of a row with what is supervised in brackets."""
    ids, supervised = data.rows["train"].row(row)
    text, before = "", False
    for token, said in zip([*ids, None], [*supervised, False], strict=True):
        text += "" if said == before else "[" if said else "]"
        text, before = text + ("" if token is None else data.tokenizer.decode([int(token)])), said
    return text


PLAIN = [
    ({"prompt": "Hi", "completion": "Yo"}, "Hi\n[Yo<eos>]"),
    ({"instruction": "Hi", "context": "C", "response": "Yo", "category": "qa"}, "Hi\nC\n[Yo<eos>]"),
    ({"system_prompt": "Be.", "question": "Hi", "response": "Yo", "id": 1}, "Be.\nHi\n[Yo<eos>]"),
    (
        {"instruction": "And?", "input": "", "output": "2", "system": "Be.", "history": [["Hi", "1"]]},
        "Be.\nHi\n[1<eos>]And?\n[2<eos>]",
    ),
    ({"prompt": "Hi", "prompt_id": "x", "messages": CHAT}, "Hi\n[FIRST<eos>]And?\n[SECOND<eos>]"),
    # columns of a table that other rows fill
    ({"messages": None, "prompt": None, "response": None, "query": "Hi", "answer": "Yo"}, "Hi\n[Yo<eos>]"),
    ({"prompt": "Hi", "messages": CHAT[1:2]}, "Hi\n[FIRST<eos>]"),
    ({"prompt": CHAT[:3], "completion": CHAT[3:]}, "Hi\nFIRST<eos>And?\n[SECOND<eos>]"),
    ({"prompt": CHAT[:1], "completion": "Yo"}, "Hi\n[Yo<eos>]"),
    (
        {"system": "Be.", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
        "Be.\nHi\n[Yo<eos>]",
    ),
    ({"messages": [{"role": "developer", "content": "Be."}, *CHAT[:2]]}, "Be.\nHi\n[FIRST<eos>]"),
    (
        {"messages": [CHAT[0], {"role": "assistant", "content": [{"type": "text", "text": t} for t in "Yo"]}]},
        "Hi\n[Yo<eos>]",
    ),
    (
        {"messages": [CHAT[0], {**CHAT[1], "weight": 0}, CHAT[2], {**CHAT[3], "weight": 1}]},
        "Hi\nFIRST<eos>And?\n[SECOND<eos>]",
    ),
    ({"messages": [CHAT[0], {**CHAT[1], "train": True}, CHAT[2], {**CHAT[3], "train": False}]}, "Hi\n[FIRST<eos>]"),
    # the fields of turns of the other form, in one table with them
    (
        {"messages": [{"from": "human", "value": "Hi", "role": None}, {**CHAT[1], "from": None, "value": None}]},
        "Hi\n[FIRST<eos>]",
    ),
    ({"messages": [{"role": "User", "content": "Hi"}, {"role": "ASSISTANT", "content": "Yo"}]}, "Hi\n[Yo<eos>]"),
    ({"messages": [CHAT[0], {**CHAT[1], "loss_mask": 0}, *CHAT[2:]]}, "Hi\nFIRST<eos>And?\n[SECOND<eos>]"),
    ({"prompt": "Hi", "response": "Yo", "weight": 1, "train": True}, "Hi\n[Yo<eos>]"),
    # last: it is named by its place below
    ({"messages": [CHAT[0], {"role": "assistant", "content": ""}, CHAT[2], CHAT[3]]}, "Hi\n<eos>And?\n[SECOND<eos>]"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "text"), PLAIN)
def test_rows_of_well_known_sets(load, row, text):
    assert text_of(load(row, style="plain")) == text


@pytest.mark.parametrize(
    ("row", "unused"),
    [
        (PLAIN[1][0], {"column category": 1}),
        ({**PLAIN[4][0], "prompt": "Other"}, {"column prompt": 1, "column prompt_id": 1}),
        ({"messages": [{**CHAT[0], "date": "today"}, CHAT[1]]}, {"field date of turns": 1}),
        (PLAIN[-1][0], {"empty answers in a chat": 1}),
        (PLAIN[3][0], {}),
        ({"messages": [{"role": "system", "content": "Be."}, *CHAT[:2]], "system": "Other."}, {"column system": 1}),
        ({"prompt": "a", "response": "b", "weight": 0.5}, {"column weight": 1}),
        ({"prompt": "a", "response": "b", "other": None, "more": ""}, {}),
        (
            {"messages": [CHAT[0], {**CHAT[1], "reasoning_content": "r"}]},
            {"reasoning_content, which style plain does not write": 1},
        ),
    ],
)
def test_what_nobody_reads_is_said_once_with_a_count_or_refused(load, row, unused):
    data = load([row, {"prompt": "a", "response": "b"}], style="plain")
    assert data.counts[""].unused == unused
    if unused:
        assert f"not used: {next(iter(sorted(unused)))} (1 rows)" in data.counts[""].sentence()
        with pytest.raises(ValueError, match=r"rows.jsonl, line 1: not used: .*; strict is true"):
            load(row, style="plain", strict=True)
    else:
        assert load(row, style="plain", strict=True).rows["train"]


def test_rows_with_no_answer_to_learn_are_left_out_and_counted(load):
    masked = {"messages": [CHAT[0], {**CHAT[1], "weight": 0}]}
    whole = [{"prompt": "a", "response": "b", "weight": 0}, {"messages": CHAT, "train": False}]
    data = load([{"prompt": "a", "response": " "}, masked, *whole, {"prompt": "a", "response": "b"}], style="plain")
    assert (len(data.rows["train"]), data.counts[""].empty, data.counts[""].read) == (1, 4, 5)
    assert data.counts[""].sentence() == "4 with no answer to learn (empty or masked) left out"
    with pytest.raises(ValueError, match="line 1: every answer is empty, or masked"):
        load({"prompt": "a", "response": ""}, strict=True)


CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
WITH_TOOL = [
    CHAT[0],
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "add"},
    CHAT[3],
]


def test_calls_of_tools_are_trained_on_where_the_template_writes_them(load):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    data = load({"messages": WITH_TOOL, "tools": json.dumps(tools)})
    call = '{"name": "add", "arguments": {"a": 1}}'
    assert (
        text_of(data)
        == f"<tool>add\n<|user|>Hi<eos>\n<|assistant|>[{call}<eos>]\n<|tool|>3<eos>\n<|assistant|>[SECOND<eos>]"
    )
    assert data.counts[""].unused == {}
    shared = [
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "SECOND"},
    ]
    assert text_of(load({"conversations": shared, "tools": tools})) == text_of(data)
    older = [
        CHAT[0],
        {"role": "assistant", "content": None, "function_call": CALL["function"]},
        {"role": "function", "content": "3", "name": "add"},
        CHAT[3],
    ]
    as_older = load({"messages": older, "functions": [tools[0]["function"]]})
    assert (text_of(as_older), as_older.counts[""].unused) == (text_of(data), {})
    with pytest.raises(ValueError, match="line 1: turn 2 holds tool_calls, which style alpaca cannot write"):
        load({"messages": WITH_TOOL}, style="alpaca")


def test_a_template_that_cannot_write_tools_says_so(load, tokenizer):
    tokenizer.chat_template = "{% for m in messages if m.role != 'tool' %}{{ m.content }}{{ eos_token }}{% endfor %}"
    for messages, message in (
        (WITH_TOOL, "does not write the tool_calls of turn 2"),
        ([*CHAT[:2], {"role": "tool", "content": "3"}, CHAT[3]], "leaves out turn 3, of the tool"),
    ):
        with pytest.raises(ValueError, match=f"line 1: the chat template {message}"):
            load({"messages": messages}, style="chat")


def test_reasoning_is_trained_on_where_the_template_writes_it(load, tokenizer):
    row = {"messages": [CHAT[0], {**CHAT[1], "reasoning_content": "Hm."}]}
    assert text_of(load(row)) == "<|user|>Hi<eos>\n<|assistant|>[<think>Hm.</think>FIRST<eos>]"
    tokenizer.chat_template = TEMPLATE.replace("m.reasoning_content", "m.no_such_field")
    data = load(row)
    assert text_of(data) == "<|user|>Hi<eos>\n<|assistant|>[FIRST<eos>]"
    assert data.counts[""].unused == {"reasoning, which the chat template does not write": 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{**CHAT[0]}, {**CHAT[1], "weight": 0.5}]}, "turn 2 in column 'messages' has weight 0.5; known"),
        ({"messages": ["Hi"]}, "turn 1 in column 'messages' is a str, not an object"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "holds a part of type image; only text"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": None}]}, "turn 2 .* holds nothing as content"),
        ({"messages": [{"role": "cat", "content": "x"}, *CHAT]}, "turn 1 has the role 'cat'; roles are system, user"),
        ({"prompt": "smile \ud83d", "response": "b"}, r"turn 1 \(user\) holds half of a character, \\ud83d"),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, "exchange 1 in column 'history' is no pair"),
        ({"conversations": [{"from": "function_call", "value": "x"}]}, "should hold JSON"),
        ({"messages": CHAT, "tools": "x"}, "column 'tools' should hold JSON, and does not"),
        ({"messages": "Hi"}, "no list in column 'messages'"),
        ({"messages": None, "prompt": None, "response": "b"}, "column 'prompt' holds nothing, not text"),
        ({"text": "only"}, "neither messages or conversations, nor a request and a response .* columns text"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_named_by_file_and_line(load, row, message):
    with pytest.raises(ValueError, match=f"rows.jsonl, line 1: .*{message}"):
        load(row, style="plain")
    data = load([row, {"prompt": "a", "response": "b"}], style="plain", on_bad_row="skip")
    assert (data.counts[""].bad, len(data.rows["train"])) == (1, 1)


def test_columns_are_read_only_where_they_are_used():
    row = Columns({"question": "Q", "answer": "A", "input": "I", "messages_of_others": [1]})
    assert [turn.role for turn in check_turns(conversation_of(row))] == ["user", "assistant"]
    assert row.unread() == ["messages_of_others"]


def test_chats_take_the_chat_template_and_others_do_not(load, tokenizer):
    for row, style in (({"messages": CHAT}, "chat"), ({"prompt": "a", "response": "b"}, "alpaca")):
        assert load(row).prompt_record()["style"] == style
    assert load({"messages": CHAT}, style="tulu").prompt_record()["style"] == "tulu"
    tokenizer.chat_template = None
    assert load({"messages": CHAT}).prompt_record()["style"] == "alpaca"
