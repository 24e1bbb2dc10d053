r"""Write conversations by a tokenizer's own chat template, and find in the text what the model says.

The text that is trained on begins with what a server asks: the template's rendering of all turns before the last
answer, with its generation prompt. The template's rendering of the whole conversation mostly goes on from there. Where
it does not, because it opens the model's thinking in the prompt and drops it from answers, as DeepSeek-R1's does, the
answer follows the prompt as it is in the data, thinking and all; an answer without any closes the thinking at once.

Answers are found by rendering once more with a placeholder in their place, so no text within an answer, be it an end
token, is taken for its end. An earlier answer whose thinking the template drops is not trained on: it would teach to
answer without it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from seedlora.datamodules.conversations import Composed, Turn
from seedlora.utils.options import name_option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: What a template that writes the date is told, so that a text is the same on every day.
FIXED_DAY = "2025-01-01"
_PLACEHOLDER = "zq0answer0qz"
_NOW = re.compile(r"strftime_now\(\s*(?:format\s*=\s*)?(['\"])(.*?)\1\s*\)")
#: A tag that the generation prompt leaves open: ``<think>``.
_OPEN_TAG = re.compile(r"<(\w+)>\s*$")
_THOUGHT = re.compile(r"^\s*(?:<think>)?(.*)</think>", re.DOTALL)
_REASONING = ("reasoning_content", "reasoning", "thinking")


def _rewriting() -> ValueError:
    return ValueError(
        "the chat template renders the beginning of a conversation differently once it goes on, so what the model says "
        f"cannot be told from the rest; choose another {name_option('data.style')}"
    )


def chat_record(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """Return what :func:`render_chat` needs of a tokenizer; None if it has no chat template."""
    if not tokenizer.chat_template:
        return None
    try:
        template = tokenizer.get_chat_template()
    except ValueError:  # several by name, and none is the default
        return None
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    day = {"today": FIXED_DAY} if "strftime_now" in template else {}
    return {"chat_template": template, "special_tokens": special, **day}


def render_chat(
    templates: Mapping[str, Any], turns: Sequence[Turn], *, generation: bool, tools: Sequence[Mapping[str, Any]] = ()
) -> str:
    """Return a conversation as a chat template writes it, in transformers' sandbox.

    Args:
        templates: as :func:`chat_record` gives it.
        turns: the conversation.
        generation: end with what opens an answer.
        tools: schemas of the tools that the model may call.

    Raises:
        ValueError: if the template refuses the conversation, or fails.
    """
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [
        {"role": t.role, "content": f"{t.content}\n{t.input}" if t.input else t.content, **t.more} for t in turns
    ]
    try:
        rendered, _ = render_jinja_template(
            [messages],
            tools=[dict(tool) for tool in tools] or None,
            chat_template=on_a_fixed_day(templates["chat_template"], templates.get("today")),
            add_generation_prompt=generation,
            **templates["special_tokens"],
        )
    except TemplateError as error:
        raise ValueError(f"the chat template refuses this conversation: {error}") from None
    except Exception as error:  # whatever a stranger's template does with the values
        raise ValueError(f"the chat template fails on this conversation: {type(error).__name__}: {error}") from None
    return str(rendered[0])


@lru_cache
def on_a_fixed_day(template: str, today: str | None) -> str:
    """Put a date into a template where it asks for that of today."""
    if today is None:
        return template
    day = datetime.fromisoformat(today)
    fixed = _NOW.sub(lambda call: repr(day.strftime(call[2])), template)
    if re.search(r"strftime_now\s*\(", fixed):
        raise ValueError(
            f"the chat template writes a date in a way that cannot be fixed; choose another {name_option('data.style')}"
        )
    return fixed


def compose_chat(record: Mapping[str, Any], turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]) -> Composed:
    """Return the training text of a conversation, and where in it the answers are.

    Args:
        record: of the style ``chat``.
        turns: of which the last is trained on.
        tools: as for :func:`render_chat`.

    Raises:
        ValueError: if the template refuses or rewrites the conversation, or leaves out what somebody says in it.
    """
    writing = _Writing(record["templates"], record["eos_token"], tuple(turns), tuple(tools))
    unwritten = writing.left_out()
    text, last = writing.last_answer()
    spans = []
    for i, turn in enumerate(turns[:-1]):
        if turn.role == "assistant" and turn.trained:
            if (span := writing.earlier_answer(i)) is None:
                unwritten.append("thinking of earlier answers, which are not trained on")
            else:
                spans.append(span)
    if not _is_in(_reasoning(turns[-1]), _without_spaces(text)):
        unwritten.append("reasoning, which the chat template does not write")
    if text.endswith(writing.eos, *last):
        last = (last[0], last[1] - len(writing.eos))
    return Composed(text[: last[1]], [*spans, last], tuple(dict.fromkeys(unwritten)))


@dataclass(frozen=True)
class _Writing:
    """A conversation as a template writes it."""

    templates: Mapping[str, Any]
    eos: str
    turns: tuple[Turn, ...]
    tools: tuple[Mapping[str, Any], ...]

    @cached_property
    def text(self) -> str:
        """Return the whole conversation."""
        return self._render(self.turns)

    def _render(self, turns: Sequence[Turn], *, generation: bool = False) -> str:
        return render_chat(self.templates, turns, generation=generation, tools=self.tools)

    def left_out(self) -> list[str]:
        """Return what the template leaves out without harm, for people.

        Raises:
            ValueError: for a turn of user or tool, or a call of a tool, that is not in the text.
        """
        text, found = _without_spaces(self.text), []
        for i, turn in enumerate(self.turns):
            for said in (turn.content, turn.input):
                if turn.role == "assistant" or _is_in(said, text):
                    continue
                if turn.role != "system":
                    raise ValueError(
                        f"the chat template leaves out turn {i + 1}, of the {turn.role}; choose another "
                        f"{name_option('data.style')}"
                    )
                found.append("system turns, which the chat template does not write")
            for call in turn.more.get("tool_calls") or ():
                if not _is_in(str(call.get("function", call).get("name", "")), text):
                    raise ValueError(f"the chat template does not write the tool_calls of turn {i + 1}")
        names = [str((tool.get("function") or tool).get("name", "")) for tool in self.tools]
        if not all(_is_in(name, text) for name in names):
            found.append("tools, which the chat template does not write")
        return found

    def last_answer(self) -> tuple[str, tuple[int, int]]:
        """Return the text that is trained on, and where in it the last answer is."""
        prompt, closing = self._render(self.turns[:-1], generation=True), self._closing(len(self.turns) - 1)
        said = self.text[len(prompt) :]
        if not self.text.startswith(prompt):
            said = self._said_after(prompt) + closing
        elif not _is_in(_thought_within(content := self.turns[-1].content), _without_spaces(said)):
            said = content + closing
        if closing and said.endswith(closing):
            end = len(said) - len(closing) + self._length_of_end(closing)
        else:
            end = len(said.rstrip())
        return prompt + said, (len(prompt), len(prompt) + end)

    def _said_after(self, prompt: str) -> str:
        """Return what the model says after a prompt that opens its thinking, where the whole text has no such place."""
        answer, tag = self.turns[-1], _OPEN_TAG.search(prompt)
        if tag is None or answer.more.get("tool_calls") or not self.text.startswith(prompt[: tag.start()]):
            raise _rewriting()
        opening, close, content = tag[0].rstrip(), f"</{tag[1]}>", answer.content
        if not _is_in(content.rpartition(close)[2], _without_spaces(self.text[tag.start() :])):
            raise _rewriting()
        if content.lstrip().startswith(opening):
            return content.lstrip()[len(opening) :].removeprefix(tag[0][len(opening) :])
        return content if close in content else f"{_reasoning(answer)}\n{close}\n\n{content}"

    def earlier_answer(self, i: int) -> tuple[int, int] | None:
        """Return where an answer before the last is in the text; None if the template has dropped its thinking."""
        turn, closing = self.turns[i], self._closing(i)
        prompt, whole = self._render(self.turns[:i], generation=True), self._render(self.turns[: i + 1])
        if self.text.startswith(whole) and whole.startswith(prompt):
            begin, end = len(prompt), len(whole.removesuffix(closing))
        elif turn.more.get("tool_calls"):
            raise _rewriting()
        else:
            begin, end = self._place(i)
            begin = len(prompt) if self.text.startswith(prompt) else begin
        said = _without_spaces(self.text[begin:end])
        dropped = not _is_in(_reasoning(turn), said) and _is_in(_reasoning(turn), _without_spaces(whole))
        if dropped or not _is_in(_thought_within(turn.content), said):
            return None
        if self.text.startswith(closing.rstrip(), end):
            end += self._length_of_end(closing)
        return begin, end

    def _place(self, i: int) -> tuple[int, int]:
        """Return where the content of a turn is in the text, by a placeholder in its stead."""
        turns = [*self.turns[:i], replace(self.turns[i], content=_PLACEHOLDER), *self.turns[i + 1 :]]
        before, found, after = self._render(turns).partition(_PLACEHOLDER)
        if not found or not (self.text.startswith(before) and self.text.endswith(after)):
            raise _rewriting()
        return len(before), len(self.text) - len(after)

    def _closing(self, i: int) -> str:
        """Return what the template writes after an answer, up to the next turn."""
        rendered = self._render([*self.turns[:i], Turn("assistant", _PLACEHOLDER)])
        return rendered.partition(_PLACEHOLDER)[2]

    def _length_of_end(self, closing: str) -> int:
        """Return how much of what follows an answer the model learns to say: up to the end token, if it is in it."""
        found = closing.find(self.eos)
        return found + len(self.eos) if found >= 0 else len(closing.rstrip())


def _reasoning(turn: Turn) -> str:
    return next((str(turn.more[key]) for key in _REASONING if turn.more.get(key)), "").strip()


def _thought_within(content: str) -> str:
    """Return what an answer says in thought before ``</think>``."""
    inside = _THOUGHT.match(content)
    return inside[1].strip() if inside else ""


def _without_spaces(text: str) -> str:
    return "".join(text.split())


def _is_in(said: str, text: str) -> bool:
    """Return whether a text without spaces holds what is said, as it is or as JSON."""
    plain = _without_spaces(said)
    return plain in text or _without_spaces(json.dumps(said, ensure_ascii=False)[1:-1]) in text
