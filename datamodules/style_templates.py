r"""Write a prompt style as a Jinja chat template, so that a server's chat endpoint asks as training did.

A server renders ``messages`` by the template beside the adapter and adds no tokens of its own, so the template holds
the token that begins a text where the tokenizer adds one in training.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from seedlora.datamodules.chat_templates import on_a_fixed_day
from seedlora.datamodules.prompts import CHAT, PromptRecord, Style

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chat_template(record: PromptRecord, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the template of a style; that of the style ``chat`` is the tokenizer's own, on the day of the training.

    Args:
        record: of :func:`seedlora.datamodules.prompts.prompt_record`.
        tokenizer: that training used.
    """
    if record["style"] == CHAT:
        return on_a_fixed_day(record["templates"]["chat_template"], record["templates"].get("today"))
    style = Style(**record["templates"])
    split = "message['content'].split('\\n', 1)" if style.split_input else "[message['content']]"
    with_input = style.user_input or style.user.replace("{content}", "{content}\n{input}")
    lines = [
        f"{{{{- {_literal(_bos(tokenizer))} -}}}}",
        "{%- if messages[0]['role'] != 'system' -%}",
        "{%- set message = messages | selectattr('role', 'equalto', 'user') | first -%}",
        f"{{%- set parts = {split} -%}}",
        f"{{{{- {_header(style)} -}}}}",
        "{%- endif -%}",
        "{%- for message in messages -%}",
        "{%- if message['role'] == 'system' -%}",
        f"{{{{- {_filled(style.system)} -}}}}",
        "{%- elif message['role'] == 'user' -%}",
        f"{{%- set parts = {split} -%}}",
        "{%- if parts | length > 1 and parts[1] -%}",
        f"{{{{- {_filled(with_input, content='parts[0]', rest='parts[1]')} -}}}}",
        "{%- else -%}",
        f"{{{{- {_filled(style.user, content='parts[0]')} -}}}}",
        "{%- endif -%}",
        "{%- elif message['role'] == 'assistant' -%}",
        f"{{{{- {_literal(style.generation)} + message['content'] + {_literal(record['eos_token'])} -}}}}",
        f"{{%- if not loop.last -%}}{{{{- {_literal(style.between)} -}}}}{{%- endif -%}}",
        "{%- else -%}",
        "{{- raise_exception('roles are system, user and assistant, not ' + message['role']) -}}",
        "{%- endif -%}",
        "{%- endfor -%}",
        f"{{%- if add_generation_prompt -%}}{{{{- {_literal(style.generation)} -}}}}{{%- endif -%}}",
    ]
    return "\n".join(lines) + "\n"


def _bos(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the token that the tokenizer puts before a text, if it does."""
    ids = tokenizer("x")["input_ids"]
    return str(tokenizer.bos_token) if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else ""


def _header(style: Style) -> str:
    if not style.header_input:
        return _literal(style.header)
    return f"{_literal(style.header_input)} if parts | length > 1 and parts[1] else {_literal(style.header)}"


def _filled(template: str, *, content: str = "message['content']", rest: str = "''") -> str:
    """Return the expression of a template with a turn filled in."""
    expression, end = [], 0
    places = {"{content}": content, "{input}": rest}
    while end < len(template):
        begin, name = min(
            ((at, name) for name in places if (at := template.find(name, end)) >= 0), default=(len(template), "")
        )
        expression += [_literal(template[end:begin])] if begin > end else []
        expression += [places[name]] if name else []
        end = begin + len(name)
    return " + ".join(expression) or "''"


def _literal(text: str) -> str:
    """Write a text as Jinja has it in an expression."""
    return json.dumps(text)
