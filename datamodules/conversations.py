"""Conversations: the turns of a row, checked, whatever form the row has and however they will be worded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Turn:
    """A turn of a conversation: what one side says.

    Args:
        role: ``system``, ``user``, ``assistant`` or ``tool``, which is what a tool that was called gave back.
        content: the text.
        input: what a user's instruction works on, for data sets that keep the two apart.
        trained: a model learns to say it, if it is the assistant's.
        more: what a chat template may write beside the text: ``tool_calls``, ``reasoning_content`` and the like.
        unread: fields that the data has and nobody reads.
    """

    role: str
    content: str
    input: str = ""
    trained: bool = True
    more: Mapping[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = ()

    @property
    def says_nothing(self) -> bool:
        """Return whether there is neither text nor a call of a tool in it."""
        return not (self.content.strip() or self.more.get("tool_calls"))


class Composed(NamedTuple):
    """A training text, which the end token follows.

    Args:
        text: all of it but the last end token.
        spans: where the supervised characters are: ``(begin, end)`` each. The last end token is supervised too.
        unwritten: what the conversation has and the text does not, for people.
    """

    text: str
    spans: list[tuple[int, int]]
    unwritten: tuple[str, ...] = ()


class NothingToLearnError(ValueError):
    """Raised for a conversation whose answers are all empty, or masked by the data."""


def exchange(prompt: str, response: str, input: str = "") -> tuple[Turn, ...]:  # noqa: A002 - the data sets' own word
    """Make a conversation of one request and one response.

    Example:
        >>> [(turn.role, turn.content) for turn in exchange("1 + 1 =", "2")]
        [('user', '1 + 1 ='), ('assistant', '2')]
    """
    return Turn("user", prompt, input), Turn("assistant", response)


def check_text(text: str, where: str) -> str:
    r"""Return a text that can be written as UTF-8.

    Raises:
        ValueError: if it holds half of a surrogate pair, as broken scrapers leave it of an emoji.

    Example:
        >>> check_text("smile " + chr(0xD83D), "column 'prompt'")
        Traceback (most recent call last):
            ...
        ValueError: column 'prompt' holds half of a character, \ud83d, after 6 characters: it is no text
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        where = f"{where} holds half of a character, {half}, after {error.start} characters"
        raise ValueError(f"{where}: it is no text") from None
    return text


def check_turns(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """Return the conversation up to the last answer that is trained on; an empty answer is not.

    Raises:
        NothingToLearnError: if no answer is left to train on.
        ValueError: if a role is unknown, the user does not begin (after at most one system turn), nobody answers, or a
            text is none.

    Example:
        >>> [turn.role for turn in check_turns([*exchange("1 + 1 =", "2"), Turn("user", "And?")])]
        ['user', 'assistant']
    """
    for i, turn in enumerate(turns):
        if turn.role not in ROLES:
            raise ValueError(f"turn {i + 1} has the role '{turn.role}'; roles are {', '.join(ROLES)}")
        if turn.role == "system" and i:
            raise ValueError(f"turn {i + 1} is a system turn; only the first can be one")
        for text in (turn.content, turn.input, *_texts(turn.more)):
            check_text(text, f"turn {i + 1} ({turn.role})")
    spoken = [turn.role for turn in turns if turn.role != "system"]
    if spoken[:1] not in ([], ["user"]):
        raise ValueError(f"the chat starts with the {spoken[0]}; a user turn must come first")
    if "assistant" not in spoken:
        raise ValueError("the chat has no assistant turn, so there is nothing to learn from it")
    learned = [i for i, turn in enumerate(turns) if is_learned(turn)]
    if not learned:
        raise NothingToLearnError("every answer is empty, or masked by the data (weight 0, train false)")
    kept = turns[: learned[-1] + 1]
    return tuple(replace(t, trained=False) if t.role == "assistant" and t.says_nothing else t for t in kept)


def is_learned(turn: Turn) -> bool:
    """Return whether a model learns to say a turn."""
    return turn.role == "assistant" and turn.trained and not turn.says_nothing


def _texts(value: object) -> list[str]:
    """Return all texts in plain data."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for pair in value.items() for each in pair for text in _texts(each)]
    return [text for each in value for text in _texts(each)] if isinstance(value, list | tuple) else []
