"""The chat template beside an adapter renders what training did, token by token."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from seedlora.datamodules.conversations import Turn
from seedlora.datamodules.prompts import STYLES, compose, prompt_record, render
from seedlora.datamodules.style_templates import chat_template
from seedlora.model.tokenizer_files import tokenizer_files

TALKS = {
    "one": [("user", "1 + 1 =")],
    "braces": [("user", "{content} of {{ x }} {% if %} 'a' \"b\" \\n")],
    "lines": [("user", "Sum up:\nfirst\nsecond")],
    "a line that ends": [("user", "Sum up:\n")],
    "system": [("system", "Be kind."), ("user", "Hello\nyou")],
    "turns": [("user", "Hello\nyou"), ("assistant", "Hi"), ("user", "And?"), ("assistant", ""), ("user", "So?\nyes")],
}


@pytest.fixture(scope="module", params=["without a bos", "with a bos"])
def tokenizer(request, tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    if request.param == "with a bos":
        from tokenizers.processors import TemplateProcessing

        tokenizer.bos_token = tokenizer.eos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A".replace("<bos>", tokenizer.bos_token),
            special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)],
        )
        assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    return tokenizer


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("style", STYLES)
def test_a_server_asks_as_training_did(tokenizer, style, talk):
    record = prompt_record(style, tokenizer)
    messages = [{"role": role, "content": content} for role, content in TALKS[talk]]
    turns = [Turn(*turn) for turn in TALKS[talk]]
    template = chat_template(record, tokenizer)
    asked = tokenizer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert asked == tokenizer(render(record, turns))["input_ids"]
    # A conversation that ends with an answer is the text of training.
    answered = [*turns, Turn("assistant", "2")]
    text = tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": "2"}], chat_template=template, tokenize=False
    )
    bos = tokenizer.bos_token if tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id else ""
    assert text == (bos or "") + compose(record, answered).text + record["eos_token"]


def test_the_files_make_the_tokenizer_again(tokenizer, tmp_path):
    before = tokenizer.chat_template
    template = chat_template(prompt_record("tulu", tokenizer), tokenizer)
    for name, content in tokenizer_files(tokenizer, chat_template=template).items():
        (tmp_path / name).write_bytes(content)
    assert tokenizer.chat_template == before
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == template
    assert again("Hello you")["input_ids"] == tokenizer("Hello you")["input_ids"]
    assert again.eos_token == tokenizer.eos_token


def test_an_unknown_role_is_refused(tokenizer):
    template = chat_template(prompt_record("plain", tokenizer), tokenizer)
    messages = [{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}]
    with pytest.raises(Exception, match="roles are system, user and assistant, not tool"):
        tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
