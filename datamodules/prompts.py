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
Jinja template, and ``special_tokens``, the texts it may ask for. ``add_special_tokens`` says whether the tokenizer puts
its own tokens (a bos, for example) around the text; a chat template has them in its text.
:func:`render` takes a record and gives the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORD_NAME = "prompt.json"
CHAT = "chat"
_ROLES = ("system", "user", "assistant")
#: A style as plain data, in the format at the top of this file; it may have been read from a ``prompt.json``.
PromptRecord: TypeAlias = Mapping[str, Any]


class Turn(NamedTuple):
    """A turn of a conversation: what one side says.

    Args:
        role: ``system``, ``user`` or ``assistant``.
        content: the text.
        input: what a user's instruction works on, for data sets that keep the two apart.
    """

    role: str
    content: str
    input: str = ""


def exchange(prompt: str, response: str, input: str = "") -> tuple[Turn, ...]:  # noqa: A002 - the data sets' own word
    """Make a conversation of one request and one response.

    Example:
        >>> exchange("1 + 1 =", "2")
        (Turn(role='user', content='1 + 1 =', input=''), Turn(role='assistant', content='2', input=''))
    """
    return Turn("user", prompt, input), Turn("assistant", response)


def check_turns(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """Return the conversation up to its last answer, if it is one.

    Raises:
        ValueError: if a role is unknown, the user does not begin (after at most one system turn), or nobody answers.

    Example:
        >>> check_turns([*exchange("1 + 1 =", "2"), Turn("user", "And?")])
        (Turn(role='user', content='1 + 1 =', input=''), Turn(role='assistant', content='2', input=''))
    """
    for i, turn in enumerate(turns):
        if turn.role not in _ROLES:
            raise ValueError(f"turn {i + 1} has the role '{turn.role}'; roles are {', '.join(_ROLES)}")
        if turn.role == "system" and i:
            raise ValueError(f"turn {i + 1} is a system turn; only the first can be one")
    spoken = [turn.role for turn in turns if turn.role != "system"]
    if spoken[:1] == ["assistant"]:
        raise ValueError("the chat starts with the assistant; a user turn must come first")
    if "assistant" not in spoken:
        raise ValueError("the chat has no assistant turn, so there is nothing to learn from it")
    last = max(i for i, turn in enumerate(turns) if turn.role == "assistant")
    return tuple(turns[: last + 1])


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
        if not isinstance(template := tokenizer.chat_template, str):
            raise ValueError(f"data.style chat: the tokenizer has no chat template; choose one of {', '.join(STYLES)}")
        special = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
        templates = {"chat_template": template, "special_tokens": special}
    else:
        templates = asdict(STYLES[style])
    return {
        "style": style,
        "templates": templates,
        "eos_token": str(tokenizer.eos_token),
        "add_special_tokens": style != CHAT,
    }


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
        return _render_chat(style, turns, generation=True)
    return "".join(text for _, text in _pieces(style, [*turns, Turn("assistant", "")])[:-2])


class Composed(NamedTuple):
    """A training text, which the end token follows.

    Args:
        text: all of it but the last end token.
        spans: where the supervised characters are: ``(begin, end)`` each. The last end token is supervised too.
    """

    text: str
    spans: list[tuple[int, int]]


def compose(record: PromptRecord, turns: Sequence[Turn]) -> Composed:
    r"""Return the text of a conversation that :func:`check_turns` passed, and the parts that a model learns to say.

    Raises:
        ValueError: if a chat template does not render the beginning of a conversation as the beginning of its text.

    Example:
        >>> record = {"style": "plain", "templates": asdict(STYLES["plain"]), "eos_token": "</s>"}
        >>> compose(record, exchange("1 + 1 =", "2"))
        Composed(text='1 + 1 =\n2', spans=[(8, 9)])
    """
    if record["style"] == CHAT:
        return _compose_chat(record, turns)
    parts = _pieces(record, turns)[:-1]  # the last end token is the tokenizer's
    text = "".join(part for _, part in parts)
    if record["templates"]["supervised"] == "all":
        return Composed(text, [(0, len(text))])
    spans: list[tuple[int, int]] = []
    end = 0
    for supervised, part in parts:
        begin, end = end, end + len(part)
        if supervised and spans and spans[-1][1] == begin:
            spans[-1] = (spans[-1][0], end)
        elif supervised:
            spans.append((begin, end))
    return Composed(text, spans)


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
            parts += [(False, style.generation), (True, turn.content), (True, record["eos_token"])]
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


def _render_chat(record: PromptRecord, turns: Sequence[Turn], *, generation: bool) -> str:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": t.role, "content": f"{t.content}\n{t.input}" if t.input else t.content} for t in turns]
    templates = record["templates"]
    try:
        rendered, _ = render_jinja_template(
            [messages],
            chat_template=templates["chat_template"],
            add_generation_prompt=generation,
            **templates["special_tokens"],
        )
    except TemplateError as error:
        raise ValueError(f"the chat template refuses this conversation: {error}") from None
    return str(rendered[0])


def _compose_chat(record: PromptRecord, turns: Sequence[Turn]) -> Composed:
    eos: str = record["eos_token"]
    text = _render_chat(record, turns, generation=False)
    spans: list[tuple[int, int]] = []
    for i, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        before = _render_chat(record, turns[:i], generation=True)
        after = text if i == len(turns) - 1 else _render_chat(record, turns[: i + 1], generation=False)
        if not after.startswith(before) or not text.startswith(after):
            raise ValueError(
                "the chat template renders the beginning of a conversation differently once it goes on, so what the "
                "model says cannot be told from the rest; choose another data.style"
            )
        said = after[len(before) :]
        found = said.rfind(eos)
        end = len(before) + (found + len(eos) if found >= 0 else len(said.rstrip()))
        spans.append((len(before), end))
    begin, end = spans[-1]
    if text[begin:end].endswith(eos):
        end -= len(eos)
    spans[-1] = (begin, end)
    return Composed(text[:end], spans)
