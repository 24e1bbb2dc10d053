"""Write an Ollama Modelfile: base model, adapter, and the prompt of the adapter's training.

Ollama's ``TEMPLATE`` is a template of Go's. What a prompt style puts around the turns of a conversation is found by
rendering a few, and said only if the template then gives the same text for others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

#: A conversation as pairs of role and content.
Turns: TypeAlias = Sequence[tuple[str, str]]
#: Gives the text after which a model answers.
Render: TypeAlias = Callable[[Turns], str]

_SYSTEM, _USER, _ANSWER, _AGAIN = "Qsystem1Q", "Quser2Q", "Qanswer3Q", "Qagain4Q"
#: What a Go template or a quoted Modelfile text cannot hold as it is.
_UNSAYABLE = re.compile(r'\{\{|\}\}|"""')
_PROBES: tuple[Turns, ...] = (
    (("user", "What is 1+1?"),),
    (("user", "a\nb"),),
    (("system", "Be kind."), ("user", "What is 1+1?")),
    (("user", "Hi"), ("assistant", "Hello."), ("user", "What is 1+1?")),
    (("system", "Be kind."), ("user", "Hi"), ("assistant", "Hi."), ("user", "1+1?"), ("assistant", "2"), ("user", "!")),
)


@dataclass(frozen=True)
class Wrapping:
    """Hold the texts that a prompt style puts around what is said.

    Args:
        header: begins a conversation without a system turn.
        system: around a system turn.
        user: around a user's turn; its second text opens the answer.
        after_answer: what follows an answer.
    """

    header: str
    system: tuple[str, str]
    user: tuple[str, str]
    after_answer: str

    def render(self, turns: Turns) -> str:
        """Return the text after which a model answers, as the Go template does."""
        texts = {"system": self.system, "user": self.user, "assistant": ("", self.after_answer)}
        said = "".join(texts[role][0] + content + texts[role][1] for role, content in turns)
        return ("" if turns[0][0] == "system" else self.header) + said

    def template(self) -> str:
        """Return the Go template."""
        system, user = ("{{ .Content }}".join(texts) for texts in (self.system, self.user))
        header = f"{{{{ if not .System }}}}{self.header}{{{{ end }}}}" if self.header else ""
        return (
            f"{header}{{{{ range .Messages }}}}"
            f'{{{{ if eq .Role "system" }}}}{system}{{{{ else if eq .Role "user" }}}}{user}'
            f"{{{{ else }}}}{{{{ .Content }}}}{self.after_answer}{{{{ end }}}}{{{{ end }}}}"
        )


def find_wrapping(render: Render, *, bos: str = "") -> Wrapping | None:
    """Find what a prompt style puts around the turns; None if that cannot be said, or not in a Go template.

    Args:
        render: of the style.
        bos: the token that Ollama puts before every text by itself.

    Returns:
        Texts that give what ``render`` gives for conversations of one to three requests, with and without a system
        turn.
    """
    try:
        one = render((("user", _USER),)).removeprefix(bos)
        two = render((("system", _SYSTEM), ("user", _USER))).removeprefix(bos)
        three = render((("user", _USER), ("assistant", _ANSWER), ("user", _AGAIN))).removeprefix(bos)
        head, opening = _split(one, _USER)
        before_system, rest = _split(two, _SYSTEM)
        between, _ = _split(rest, _USER)
        _, rest = _split(_split(three, _USER)[1], _ANSWER)
        after_answer, _ = _split(rest, _AGAIN)
        before_user = _common_end(head, between, after_answer)
        cut = len(before_user)
        found = Wrapping(
            header=head[: len(head) - cut],
            system=(before_system, between[: len(between) - cut]),
            user=(before_user, opening),
            after_answer=after_answer[: len(after_answer) - cut],
        )
        if any(found.render(turns) != render(turns).removeprefix(bos) for turns in _PROBES):
            return None
    except ValueError:
        return None
    texts = (found.header, *found.system, *found.user, found.after_answer)
    return None if any(map(_UNSAYABLE.search, texts)) else found


def _split(text: str, word: str) -> tuple[str, str]:
    if text.count(word) != 1:
        raise ValueError(f"'{word}' is there {text.count(word)} times")
    before, _, after = text.partition(word)
    return before, after


def _common_end(*texts: str) -> str:
    shortest = min(texts, key=len)
    ends = (shortest[i:] for i in range(len(shortest) + 1))
    return next(end for end in ends if all(text.endswith(end) for text in texts))


def modelfile(
    *, base: str, adapter: str | None, wrapping: Wrapping | None, stop: str | None, notes: Sequence[str] = ()
) -> str:
    """Return the text of a Modelfile.

    Args:
        base: what Ollama starts from: a file or a folder; a path that is relative is so to the Modelfile.
        adapter: the adapter's file. Default: it is in the base.
        wrapping: of the prompts of its training.
        stop: what ends an answer.
        notes: comments at the top, a line each.
    """
    lines = [*(f"# {note}" for note in notes), f"FROM {base}"]
    lines += [] if adapter is None else [f"ADAPTER {adapter}"]
    lines += [] if wrapping is None else [f'TEMPLATE """{wrapping.template()}"""']
    lines += [f'PARAMETER stop "{stop}"'] if stop and '"' not in stop else []
    return "\n".join([*lines, ""])


def prompt_facts(record: Mapping[str, Any], render: Render) -> tuple[Wrapping | None, str | None]:
    """Return the wrapping of a prompt record, and what ends an answer.

    Args:
        record: what ``prompt.json`` holds.
        render: by this record.
    """
    templates = record.get("templates") or {}
    stop = record.get("eos_token") or None
    if "strftime_now" in str(templates.get("chat_template", "")):  # the date of today would stay in the file
        return None, stop
    bos = str((templates.get("special_tokens") or {}).get("bos_token", ""))
    return find_wrapping(render, bos=bos), stop
