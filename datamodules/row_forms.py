"""Tell the form of a row by its columns, and make a conversation of it.

Forms: a chat in ``messages`` or ShareGPT's ``conversations``; TRL's ``prompt`` and ``completion``, each a text or a
list of turns; a request and a response under the names of many data sets (Alpaca with ``history``, Dolly with
``context``, Orca with ``system_prompt``). Which columns were read is known afterwards, so that the others can be said.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from seedlora.datamodules.conversations import ROLES, Turn
from seedlora.utils.options import name_option

#: Columns of a request and of its response, in the order in which they are looked for.
PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("query", "answer"),
)
CHATS = ("messages", "conversations", "conversation")
_INPUTS, _SYSTEMS = ("input", "context"), ("system", "system_prompt")
_ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "developer": "system",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
#: Fields of a turn that say whether it is trained on.
_MASKS = ("weight", "train", "training", "loss", "loss_mask")
#: Columns of a row that say so of all its answers, where they hold 0, 1, true or false.
_ROW_MASKS = ("weight", "train")
#: Fields of a turn that a chat template may write.
_WRITTEN = ("tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning", "thinking")


class Columns(Mapping[str, Any]):
    """A row that remembers which of its columns were read."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        self._row, self._read = row, set[str]()

    def __getitem__(self, column: str) -> Any:
        value = self._row[column]
        self._read.add(column)
        return value

    def __contains__(self, column: object) -> bool:
        return column in self._row

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)

    def peek(self, column: str) -> Any:
        """Return what a column holds, or None, without reading it."""
        return self._row.get(column)

    def unread(self) -> list[str]:
        """Return the columns that hold something and were not read."""
        return [name for name, value in self._row.items() if name not in self._read and value not in (None, "", [], {})]


def is_chat(row: Mapping[str, Any]) -> bool:
    """Return whether a row holds turns, rather than a request and a response.

    Example:
        >>> is_chat({"conversations": []}), is_chat({"prompt": "Hi", "completion": "Yo"})
        (True, False)
    """
    columns = [row.get(column) for column in (*CHATS, "completion")]
    return any(isinstance(turns, list) and all(isinstance(turn, Mapping) for turn in turns) for turns in columns)


def conversation_of(row: Mapping[str, Any], own_pair: tuple[str, str] | None = None) -> list[Turn]:
    """Return the conversation that a row holds, by the columns that are there.

    Args:
        row: its columns.
        own_pair: the columns of request and response, where the user named them.

    Raises:
        ValueError: if it holds none, or something in it that is not understood.

    A column ``weight`` or ``train`` of 0 or false masks all answers of its row.

    Example:
        >>> [(t.role, t.content) for t in conversation_of({"question": "1 + 1?", "response": "2"})]
        [('user', '1 + 1?'), ('assistant', '2')]
    """
    turns = _turns_of(row, own_pair)
    masks = [column for column in _ROW_MASKS if _peek(row, column) in (0, 1)]
    return turns if all(row[column] for column in masks) else [replace(turn, trained=False) for turn in turns]


def _turns_of(row: Mapping[str, Any], own_pair: tuple[str, str] | None) -> list[Turn]:
    if own_pair is None:
        for column in CHATS:
            if _peek(row, column) not in (None, ""):
                return _with_system(row, _with_prompt(row, turns_column(row, column)))
        if isinstance(_peek(row, "completion"), list) or isinstance(_peek(row, "prompt"), list):
            return _with_system(row, _prompt_and_completion(row))
    for request, response in [own_pair] if own_pair else PAIRS:
        if own_pair or None not in (_peek(row, request), _peek(row, response)):
            return _with_system(row, [*_history(row), *_exchange(row, request, response)])
    for request, response in PAIRS:
        if request in row and request != "question" and (row[request] is not None or response not in row):
            for column in (request, response):  # the first that is missing is said
                text_column(row, column)
    known = ", ".join(sorted({" and ".join(pair) for pair in PAIRS}))
    raise ValueError(
        f"neither messages or conversations, nor a request and a response ({known}) are among its columns "
        f"{', '.join(sorted(map(str, row))) or '(none)'}; rename two, or take the file by "
        f"InstructionData with {name_option('data.prompt_field')} and {name_option('data.response_field')}"
    )


def request_of(row: Mapping[str, Any]) -> list[Turn]:
    """Return the conversation of a row up to its last request, whether or not the row has the answer too.

    Raises:
        ValueError: if there is no request in it, or something that is not understood.

    Example:
        >>> [(t.role, t.content) for t in request_of({"prompt": "1 + 1?"})]
        [('user', '1 + 1?')]
    """
    if not is_chat(row):
        asked = [pair for pair in PAIRS if _peek(row, pair[0]) not in (None, "")]
        if asked and all(_peek(row, response) is None for _, response in asked):
            row = {**row, asked[0][1]: ""}
    turns = conversation_of(row)
    while turns and turns[-1].role == "assistant":
        turns.pop()
    if not turns:
        raise ValueError("it holds no request")
    return turns


def text_column(row: Mapping[str, Any], field: str) -> str:
    """Return the text of a column that must hold text.

    Raises:
        ValueError: naming the columns found.
    """
    value = row.get(field)
    if not isinstance(value, str):
        found = ", ".join(sorted(map(str, row))) or "none"
        kind = "nothing" if value is None else f"a {type(value).__name__}"
        problem = f"column '{field}' holds {kind}, not text" if field in row else f"no column '{field}'"
        raise ValueError(f"{problem}; its columns are {found}")
    return value


def turns_column(row: Mapping[str, Any], column: str = "messages") -> list[Turn]:
    """Return the turns of a column of ``{"role": ..., "content": ...}`` or of ``{"from": ..., "value": ...}``.

    Raises:
        ValueError: naming the turn that is none.
    """
    if not isinstance(turns := row.get(column), list):
        found = ", ".join(sorted(map(str, row))) or "none"
        raise ValueError(f"no list in column '{column}'; its columns are {found}")
    return [_turn(turn, f"turn {i + 1} in column '{column}'") for i, turn in enumerate(turns)]


def _peek(row: Mapping[str, Any], column: str) -> Any:
    return row.peek(column) if isinstance(row, Columns) else row.get(column)


def _turn(turn: object, where: str) -> Turn:
    if not isinstance(turn, Mapping):
        raise ValueError(f"{where} is a {type(turn).__name__}, not an object")
    # A table that has turns of both forms fills the fields of the other with nothing.
    says, holds = ("from", "value") if turn.get("role") is None and "from" in turn else ("role", "content")
    role = turn.get(says)
    if not isinstance(role, str):
        raise ValueError(f"{where} has no text as role (or from); its fields are {', '.join(map(str, turn)) or 'none'}")
    more = {key: turn[key] for key in _WRITTEN if turn.get(key) not in (None, "", [])}
    if "tool_calls" not in more and turn.get("function_call"):
        more["tool_calls"] = [turn["function_call"]]
    content = _content(turn.get(holds), where, optional="tool_calls" in more)
    if role in ("function_call", "tool_call"):
        content, more = "", {**more, "tool_calls": _parsed(content, where)}
    if "tool_calls" in more:
        more["tool_calls"] = [_tool_call(call, where) for call in _as_list(more["tool_calls"])]
    masks = [key for key in _MASKS if turn.get(key) is not None]
    read = {says, holds, *more, *masks, *(["function_call"] if "tool_calls" in more else [])}
    unread = tuple(str(key) for key, value in turn.items() if key not in read and value not in (None, "", [], {}))
    masked = [key for key in masks if not _is_trained(key, turn[key], where)]
    known = _ROLES.get(role.lower(), role.lower())
    return Turn(known if known in ROLES else role, content, trained=not masked, more=more, unread=unread)


def _content(value: object, where: str, *, optional: bool) -> str:
    """Return the text of a turn, which may be in parts."""
    if value is None and optional:
        return ""
    if isinstance(value, list):
        for part in value:
            if not (isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise ValueError(f"{where} holds a part of type {kind}; only text can be trained on")
        return "".join(part["text"] for part in value)
    if not isinstance(value, str):
        kind = "nothing" if value is None else f"a {type(value).__name__}"
        raise ValueError(f"{where} holds {kind} as content (or value), not text")
    return value


def _is_trained(field: str, value: object, where: str) -> bool:
    if isinstance(value, bool) or value in (0, 1):
        return bool(value)
    raise ValueError(f"{where} has {field} {value!r}; known are 0, 1, true and false")


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _parsed(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{where} should hold JSON, and does not") from None


def _tool_call(call: object, where: str) -> dict[str, Any]:
    """Return a call as chat templates read it: arguments as an object, not as JSON within JSON."""
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise ValueError(f"{where} has a call of a tool without a name")
    arguments = inner.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = None
        arguments = parsed if isinstance(parsed, dict) else arguments
    rest = {key: value for key, value in call.items() if value is not None} if "function" in call else {}
    return {"type": "function", **rest, "function": {**inner, "arguments": {} if arguments is None else arguments}}


def tools_of(row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return the schemas of a row's tools; the column may hold them as JSON, and older data has ``functions``."""
    column = next((name for name in ("tools", "functions") if _peek(row, name)), None)
    if column is None:
        return ()
    tools = row[column]
    if isinstance(tools, str):
        tools = _parsed(tools, f"column '{column}'")
    if tools is None:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"column '{column}' holds no list of objects")
    return tools if column == "tools" else [{"type": "function", "function": tool} for tool in tools]


def _with_system(row: Mapping[str, Any], turns: list[Turn]) -> list[Turn]:
    """Put the system turn of a column before the others."""
    if turns and turns[0].role == "system":
        return turns
    for column in _SYSTEMS:
        if isinstance(_peek(row, column), str) and _peek(row, column):
            return [Turn("system", row[column]), *turns]
    return turns


def _with_prompt(row: Mapping[str, Any], turns: list[Turn]) -> list[Turn]:
    """Return a chat with the request of its column ``prompt``, where the chat does not begin with it itself."""
    spoken = [turn for turn in turns if turn.role != "system"]
    prompt = _peek(row, "prompt")
    if not isinstance(prompt, str) or not spoken:
        return turns
    if spoken[0].role == "assistant":
        return [*turns[: turns.index(spoken[0])], Turn("user", row["prompt"]), *spoken]
    if spoken[0].content.strip() == prompt.strip():
        row["prompt"]
    return turns


def _prompt_and_completion(row: Mapping[str, Any]) -> list[Turn]:
    """Return TRL's form: what is in the prompt is not trained on."""

    def part(column: str, role: str) -> list[Turn]:
        is_list = isinstance(_peek(row, column), list)
        return turns_column(row, column) if is_list else [Turn(role, text_column(row, column))]

    before, said = part("prompt", "user"), part("completion", "assistant")
    return [*(replace(turn, trained=False) for turn in before), *said]


def _history(row: Mapping[str, Any]) -> list[Turn]:
    """Return the earlier exchanges of Alpaca's form: pairs of request and response, which are trained on too."""
    history = row["history"] if _peek(row, "history") else []
    turns: list[Turn] = []
    for i, pair in enumerate(history if isinstance(history, list) else [history]):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ValueError(f"exchange {i + 1} in column 'history' is no pair of texts")
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    return turns


def _exchange(row: Mapping[str, Any], request: str, response: str) -> list[Turn]:
    given = next((column for column in _INPUTS if column not in (request, response) and _peek(row, column)), None)
    about = "" if given is None else text_column(row, given)
    return [Turn("user", text_column(row, request), about), Turn("assistant", text_column(row, response))]
