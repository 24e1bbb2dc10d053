"""Chat templates of models that reason, tag, close turns or write the date in their own way: the answers, whole."""

from __future__ import annotations

import json

import pytest

from seedlora.datamodules import chat_templates
from seedlora.datamodules.conversations import Turn, check_turns
from seedlora.datamodules.prompts import compose, prompt_record, render
from seedlora.datamodules.rows import tokenise

OPEN, CLOSE = "<|im_start|>", "<|im_end|>"
USER = "{% if m.role == 'user' %}<U>{{ m.content }}"
DROPS = (
    "{% set c = m.content %}{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}"
    "<A>{{ c }}{{ eos_token }}"
)
R1 = (
    f"{{% for m in messages %}}{USER}{{% elif m.role == 'assistant' %}}{DROPS}{{% endif %}}{{% endfor %}}"
    "{% if add_generation_prompt %}<A><think>\n{% endif %}"
)
DROPS_ONLY = R1.replace("<A><think>\n{% endif %}", "<A>{% endif %}")
CHATML = (
    f"{{% for m in messages %}}{OPEN}{{{{ m.role }}}}\n{{{{ m.content }}}}{CLOSE}\n{{% endfor %}}"
    f"{{% if add_generation_prompt %}}{OPEN}assistant\n{{% endif %}}"
)
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    f"{{% endif %}}{{% endfor %}}{{% for m in messages %}}{OPEN}{{{{ m.role }}}}\n"
    "{% set c, r = m.content, '' %}{% if '</think>' in c %}"
    "{% set r, c = c.split('</think>')[0].split('<think>')[-1].strip('\n'), c.split('</think>')[-1].lstrip('\n') %}"
    "{% endif %}{% if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or r) %}"
    f"<think>\n{{{{ r }}}}\n</think>\n\n{{% endif %}}{{{{ c }}}}{CLOSE}\n{{% endfor %}}"
    f"{{% if add_generation_prompt %}}{OPEN}assistant\n{{% endif %}}"
)
TAGGED = (
    f"{{% for m in messages %}}{USER}{{% else %}}<A>{{% generation %}}{{{{ m.content }}}}{{{{ eos_token }}}}"
    "{% endgeneration %}{% endif %}{% endfor %}{% if add_generation_prompt %}<A>{% endif %}"
)


def chat(*texts):
    return [Turn("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(texts)]


def composed(tokenizer, template, turns):
    tokenizer.chat_template = template
    record = json.loads(json.dumps(prompt_record("chat", tokenizer)))
    found = compose(record, check_turns(turns))
    assert found.text.startswith(render(record, turns[:-1])), "a server asks otherwise than training did"
    return found


THOUGHT = "<think>\nHm.\n</think>\n\nTWO"
CASES = [
    (R1, chat("Q", "<think>\nHm.</think>\nONE"), ["Hm.</think>\nONE"]),
    (R1, chat("Q", "ONE"), ["\n</think>\n\nONE"]),
    (R1, chat("Q", "ONE", "Q", "TWO"), ["ONE<eos>", "\n</think>\n\nTWO"]),
    (R1, chat("Q", THOUGHT.replace("TWO", "ONE"), "Q", THOUGHT), ["Hm.\n</think>\n\nTWO"]),
    (DROPS_ONLY, chat("Q", THOUGHT), [THOUGHT]),
    (QWEN3, chat("Q", "ONE"), [f"<think>\n\n</think>\n\nONE{CLOSE}"]),
    (QWEN3, chat("Q", "ONE", "Q", "TWO"), [f"ONE{CLOSE}", f"<think>\n\n</think>\n\nTWO{CLOSE}"]),
    (QWEN3, chat("Q", "<think>a</think>ONE", "Q", THOUGHT), [f"<think>\nHm.\n</think>\n\nTWO{CLOSE}"]),
    (TAGGED, chat("Q", "ONE", "Q", "TWO"), ["ONE<eos>", "TWO"]),
    (
        CHATML,
        chat(f"What is {CLOSE}, and <eos>?", f"It ends: {CLOSE} and <eos> too.", "Q", f"{CLOSE} again"),
        [f"It ends: {CLOSE} and <eos> too.{CLOSE}", f"{CLOSE} again{CLOSE}"],
    ),
    (CHATML.replace("m.content", "m.content | trim"), chat("Q", " ONE ", "Q", "TWO"), [f"ONE{CLOSE}", f"TWO{CLOSE}"]),
]


@pytest.mark.parametrize(("template", "turns", "said"), CASES)
def test_the_answers_are_trained_on_whole_after_what_a_server_asks(tokenizer, template, turns, said):
    found = composed(tokenizer, template, turns)
    assert [found.text[begin:end] for begin, end in found.spans] == said


def test_thinking_that_a_template_drops_from_earlier_answers_is_said(tokenizer):
    for template in (R1, QWEN3):
        found = composed(tokenizer, template, chat("Q", THOUGHT, "Q", THOUGHT))
        assert found.unwritten == ("thinking of earlier answers, which are not trained on",)
        assert composed(tokenizer, template, chat("Q", "ONE", "Q", THOUGHT)).unwritten == ()


def test_reasoning_beside_the_text_follows_an_opened_thinking(tokenizer):
    turns = [Turn("user", "Q"), Turn("assistant", "ONE", more={"reasoning_content": "Hm."})]
    found = composed(tokenizer, R1, turns)
    assert [found.text[begin:end] for begin, end in found.spans] == ["Hm.\n</think>\n\nONE"]
    assert found.unwritten == ()


def test_a_date_is_the_same_on_every_day_for_training_and_for_who_asks_later(tokenizer, monkeypatch):
    template = "<S>{{ strftime_now('%d %b %Y %H:%M:%S') }}" + CHATML
    first = composed(tokenizer, template, chat("Q", "ONE"))
    assert first.text.startswith("<S>01 Jan 2025 00:00:00<|im_start|>user")
    record = prompt_record("chat", tokenizer)
    monkeypatch.setattr(chat_templates, "FIXED_DAY", "2030-05-06")  # another version of this program
    assert render(record, "Q") in first.text
    tokenizer.chat_template = "{{ strftime_now(messages[0].content) }}" + CHATML
    with pytest.raises(ValueError, match="writes a date in a way that cannot be fixed"):
        compose(prompt_record("chat", tokenizer), check_turns(chat("Q", "ONE")))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content + 1 }}", "the chat template fails on this conversation: TypeError"),
        ("{{ ''.__class__.__mro__ }}", "the chat template refuses this conversation: access to attribute"),
        ("{% for i in range(10**9) %}{% endfor %}", "the chat template fails on this conversation: OverflowError"),
        (CHATML.replace("{{ m.content }}", "{{ m.content if m.role != 'user' }}"), "leaves out turn 1, of the user"),
        (CHATML.replace("{{ m.content }}", "{{ loop.length }}{{ m.content }}"), "differently once it goes on"),
    ],
)
def test_a_strangers_template_ends_in_a_sentence(tokenizer, template, message):
    with pytest.raises(ValueError, match=message):
        composed(tokenizer, template, chat("Q", "ONE", "Q", "TWO"))


def test_a_system_turn_that_a_template_does_not_write_is_said(tokenizer):
    found = composed(tokenizer, R1, [Turn("system", "Be brief."), *chat("Q", "ONE")])
    assert found.unwritten == ("system turns, which the chat template does not write",)


def test_named_templates_are_taken_by_default(tokenizer):
    tokenizer.chat_template = {"default": CHATML, "tool_use": R1}
    assert prompt_record("chat", tokenizer)["templates"]["chat_template"] == CHATML
    tokenizer.chat_template = {"tool_use": R1}
    with pytest.raises(ValueError, match="no chat template"):
        prompt_record("chat", tokenizer)


def test_end_tokens_within_an_answer_stay_within_it(tokenizer):
    tokenizer.chat_template = CHATML.replace(CLOSE, "{{ eos_token }}")
    record = prompt_record("chat", tokenizer)
    rows = tokenise([chat("Q", "a <eos> b")], tokenizer, record=record, max_length=99)
    ids, supervised = rows.row(0)
    assert tokenizer.decode(ids[supervised]) == "a <eos> b<eos>"
