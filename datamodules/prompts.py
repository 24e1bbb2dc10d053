r"""Prompt styles: how a conversation becomes text, and which part of the text a model learns to say.

A style is pure data. Its *record*, which is kept beside every adapter as ``prompt.json``, is that data once more, as
JSON, so that whoever evaluates or serves the adapter asks exactly as training did, with no part of training at hand::

    {
      "style": "alpaca",
      "templates": {"header": "Below is ...", "user": "### Instruction:\n{content}\n\n", ...},
      "eos_token": "</s>",
      "add_special_tokens": true
    }

``templates`` holds the fields of :class:`Style`; for the style ``chat`` it holds ``chat_template``, the tokenizer's own
Jinja template, ``special_tokens``, the texts it may ask for, and, where it writes the date, ``today``, the one that it
was told. ``add_special_tokens`` says whether the tokenizer puts its own tokens (a bos, for example) around the text; a
chat template has them in its text.
:func:`render` takes a record and gives the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

from seedlora.datamodules.chat_templates import chat_record, compose_chat, render_chat
from seedlora.datamodules.conversations import Composed as Composed
from seedlora.datamodules.conversations import Turn as Turn
from seedlora.datamodules.conversations import check_text as check_text
from seedlora.datamodules.conversations import check_turns as check_turns
from seedlora.datamodules.conversations import exchange as exchange
from seedlora.utils.options import name_option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORD_NAME = "prompt.json"
CHAT = "chat"
#: A style as plain data, in the format at the top of this file; it may have been read from a ``prompt.json``.
PromptRecord: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Style:
    r"""The texts around what is said. ``{content}`` and ``{input}`` stand for those of the turn.

    A conversation is ``header user generation answer eos between user generation answer eos ...``; a system turn takes
    the place of the header.

    Args:
        user: a user's turn.
        generation: what follows it and opens the answer; never trained on.
        between: between an answer's end token and the next turn.
        system: a system turn.
        header: begins a conversation without a system turn.
        user_input: a user's turn that has an ``input``; empty puts the input on its own line after the content.
        header_input: the header when the first user's turn has an ``input``; empty takes ``header``.
        split_input: what follows the first newline of a user's content becomes its ``input``.
        supervised: ``assistant``, the answers and their end tokens, or ``all``, the whole text.
    """

    user: str
    generation: str = ""
    between: str = ""
    system: str = "{content}\n\n"
    header: str = ""
    user_input: str = ""
    header_input: str = ""
    split_input: bool = False
    supervised: str = "assistant"


_DESCRIBES_TASK = "Below is an instruction that describes a task"
_WITH_INPUT = ", paired with an input that provides further context"
_ANSWER = ". Write a response that appropriately completes the request."
_ALPACA = Style(
    header=f"{_DESCRIBES_TASK}{_ANSWER}\n\n",
    user="### Instruction:\n{content}\n\n",
    header_input=f"{_DESCRIBES_TASK}{_WITH_INPUT}{_ANSWER}\n\n",
    user_input="### Instruction:\n{content}\n\n### Input:\n{input}\n\n",
    generation="### Response:",
    between="\n\n",
)
_INDENT = " " * 16
#: Sources: ``alpaca`` and ``alpaca_split`` are MetaMath's two readings of Stanford Alpaca's prompt; ``tulu`` is
#: Open-Instruct's; ``llm_adapters`` is the commonsense prompt of LLM-Adapters as DoRA's code has it, with the
#: indentation and trailing spaces of its source code, which the published adapters were trained on.
STYLES: Mapping[str, Style] = MappingProxyType(
    {
        "plain": Style(user="{content}\n", system="{content}\n"),
        "alpaca": _ALPACA,
        "alpaca_split": Style(**{**asdict(_ALPACA), "split_input": True}),
        "tulu": Style(
            system="<|system|>\n{content}\n",
            user="<|user|>\n{content}\n",
            generation="<|assistant|>\n",
            between="\n",
        ),
        "llm_adapters": Style(
            header=f"{_DESCRIBES_TASK}{_ANSWER}  \n\n",
            user=f"{_INDENT}### Instruction:\n{_INDENT}{{content}}\n{_INDENT}\n",
            header_input=f"{_DESCRIBES_TASK}{_WITH_INPUT}{_ANSWER} \n\n",
            user_input=(
                f"{_INDENT}### Instruction:\n{_INDENT}{{content}}\n{_INDENT}\n"
                f"{_INDENT}### Input:\n{_INDENT}{{input}}\n{_INDENT}\n"
            ),
            generation=f"{_INDENT}### Response:\n{_INDENT}",
            between="\n\n",
            supervised="all",
        ),
    }
)


def check_style(name: str) -> None:
    """Raise ValueError, naming the styles, for a name that is none.

    Example:
        >>> check_style("fancy")
        Traceback (most recent call last):
            ...
        ValueError: Unknown prompt style 'fancy'; choose one of alpaca, alpaca_split, chat, llm_adapters, plain, tulu
    """
    if name != CHAT and name not in STYLES:
        raise ValueError(f"Unknown prompt style '{name}'; choose one of {', '.join(sorted([*STYLES, CHAT]))}")


def prompt_record(style: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return all that :func:`render` needs, as plain data for JSON; the format is at the top of this file.

    Raises:
        ValueError: for an unknown style, a tokenizer without an end token, or ``chat`` without a chat template.
    """
    check_style(style)
    if tokenizer.eos_token is None:
        raise ValueError("the tokenizer has no end token (eos_token), so a model could not learn to stop")
    templates: dict[str, Any]
    if style == CHAT:
        if (found := chat_record(tokenizer)) is None:
            raise ValueError(
                f"{name_option('data.style', 'chat')}: the tokenizer has no chat template; choose one of "
                f"{', '.join(STYLES)}"
            )
        templates = found
    else:
        templates = asdict(STYLES[style])
    return {
        "style": style,
        "templates": templates,
        "eos_token": str(tokenizer.eos_token),
        "add_special_tokens": style != CHAT,
    }


def asked_of_a_server(record: PromptRecord) -> str:
    """Say how a server must be asked, so that it asks as training did.

    Example:
        >>> asked_of_a_server({"style": "tulu"})
        'style tulu: a server asks in it by the chat template beside the adapter (vLLM: --chat-template)'
    """
    if not record:
        return "worded by a data module of your own: ask as it does"
    if record["style"] == CHAT:
        return "the base model's own chat template: a server's chat endpoint asks in the same way"
    return (
        f"style {record['style']}: a server asks in it by the chat template beside the adapter (vLLM: --chat-template)"
    )


def trains_on_prompts(record: PromptRecord) -> bool:
    """Return whether the whole text of a row is trained on, and not the answers alone."""
    return bool(record["templates"].get("supervised") == "all")


def render(style: str | PromptRecord, turns: str | Sequence[Turn]) -> str:
    r"""Return the text after which the model answers.

    Args:
        style: a record, or the name of a style other than ``chat``.
        turns: a user's request, or a conversation that ends with one. Answers given in it are followed by the record's
            end token; a style by its name has none.

    Raises:
        ValueError: for an unknown style, or answers with a style that is given by its name.

    Example:
        >>> render("tulu", "1 + 1 =")
        '<|user|>\n1 + 1 =\n<|assistant|>\n'
    """
    turns = [Turn("user", turns)] if isinstance(turns, str) else list(turns)
    if isinstance(style, str):
        check_style(style)
        if style == CHAT or any(turn.role == "assistant" for turn in turns):
            raise ValueError(f"prompt style '{style}' by its name alone cannot render this; give its record")
        style = {"style": style, "templates": asdict(STYLES[style]), "eos_token": ""}
    if style["style"] == CHAT:
        return render_chat(style["templates"], turns, generation=True)
    return "".join(text for _, text in _pieces(style, [*turns, Turn("assistant", "")])[:-2])


def compose(record: PromptRecord, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]] = ()) -> Composed:
    r"""Return the text of a conversation that :func:`check_turns` passed, and the parts that a model learns to say.

    Args:
        record: how it is worded.
        turns: what is said.
        tools: schemas of the tools that the model may call; only a chat template can write them.

    Raises:
        ValueError: if the style cannot write what is said, or a chat template does not render the beginning of a
            conversation as the beginning of its text.

    Example:
        >>> record = {"style": "plain", "templates": asdict(STYLES["plain"]), "eos_token": "</s>"}
        >>> compose(record, exchange("1 + 1 =", "2"))
        Composed(text='1 + 1 =\n2', spans=[(8, 9)], unwritten=())
    """
    if record["style"] == CHAT:
        return compose_chat(record, turns, tools)
    unwritten = _beyond_plain_text(record["style"], turns)
    if tools:
        unwritten.append(f"tools, which style {record['style']} does not write")
    parts = _pieces(record, turns)[:-1]  # the last end token is the tokenizer's
    text = "".join(part for _, part in parts)
    if trains_on_prompts(record):
        return Composed(text, [(0, len(text))], tuple(unwritten))
    spans: list[tuple[int, int]] = []
    end = 0
    for supervised, part in parts:
        begin, end = end, end + len(part)
        if supervised and spans and spans[-1][1] == begin:
            spans[-1] = (spans[-1][0], end)
        elif supervised:
            spans.append((begin, end))
    return Composed(text, spans, tuple(unwritten))


def _beyond_plain_text(style: str, turns: Sequence[Turn]) -> list[str]:
    """Return what turns hold beside their text, which a style of text does not write, for people.

    Raises:
        ValueError: for tools, without which the conversation would be another.
    """
    for i, turn in enumerate(turns):
        if turn.role == "tool" or turn.more.get("tool_calls"):
            what = "tool_calls" if turn.role == "assistant" else "what a tool gave back"
            raise ValueError(
                f"turn {i + 1} holds {what}, which style {style} cannot write; {name_option('data.style', 'chat')} may"
            )
    return [f"{key}, which style {style} does not write" for key in dict.fromkeys(key for t in turns for key in t.more)]


def _pieces(record: PromptRecord, turns: Sequence[Turn]) -> list[tuple[bool, str]]:
    """Return the text in pieces, each with whether a model learns to say it; answers are ``content``, ``eos``,
    ``between``.
    """
    style = Style(**record["templates"])
    if style.split_input:
        turns = [_split_input(turn) for turn in turns]
    first = next((turn for turn in turns if turn.role == "user"), Turn("user", ""))
    parts = []
    if turns[0].role != "system":
        parts.append((False, style.header_input if first.input and style.header_input else style.header))
    for turn in turns:
        if turn.role == "assistant":
            said = turn.trained
            parts += [(False, style.generation), (said, turn.content), (said, record["eos_token"])]
            parts.append((False, style.between))
        elif turn.role == "system":
            parts.append((False, _fill_template(style.system, turn)))
        elif turn.input:
            parts.append(
                (False, _fill_template(style.user_input or style.user.replace("{content}", "{content}\n{input}"), turn))
            )
        else:
            parts.append((False, _fill_template(style.user, turn)))
    return parts[:-1] if turns[-1].role == "assistant" else parts


def _split_input(turn: Turn) -> Turn:
    if turn.role != "user" or turn.input:
        return turn
    content, _, rest = turn.content.partition("\n")
    return Turn("user", content, rest)


def _fill_template(template: str, turn: Turn) -> str:
    """Fill in a turn in one pass, so that braces in what is said stay as they are."""
    return re.sub(r"\{(content|input)\}", lambda match: getattr(turn, match[1]), template)
