"""Adapters that answer side by side, as the commands ``chat`` and ``generate`` ask them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from seedlora.adapters.adapter import CONFIG_NAME, PROMPT_NAME, is_model
from seedlora.adapters.reading import base_model_of
from seedlora.cli.adapter_choice import choose_adapters
from seedlora.cli.command_parser import NAMED_BASE_HELP, SOURCE_HELP, CommandParser
from seedlora.datamodules import prompts
from seedlora.datamodules.conversations import Turn
from seedlora.datamodules.prompts import CHAT, PromptRecord
from seedlora.evaluation.answering import DTYPES, Participants, from_folders
from seedlora.evaluation.generate import Generation, OnText, Prompt, StackGenerator
from seedlora.evaluation.sampling import Sampling
from seedlora.model.loading import load_tokenizer
from seedlora.names import BASE

#: The style of a base model that has no chat template, and of an adapter over it that does not say how it was trained.
PLAIN = "plain"


@dataclass(frozen=True)
class Speakers:
    """Hold adapters over one base model in this process, and how each of them is asked.

    Args:
        generator: answers for all of them in one forward.
        records: the prompt style of each by its name, in the order in which they are shown.
        pick: draws their tokens; None takes the most likely.
        max_new_tokens: of one answer.
        notes: sentences for people.
    """

    generator: StackGenerator
    records: Mapping[str, PromptRecord]
    pick: Callable[[Tensor], Tensor] | None
    max_new_tokens: int
    notes: Sequence[str]

    def answer(
        self, conversations: Mapping[str, Sequence[Sequence[Turn]]], on_text: OnText | None = None
    ) -> dict[str, list[Generation]]:
        """Answer conversations, equally many of each adapter.

        Args:
            conversations: by adapter; each ends with a user's turn.
            on_text: called with what was said so far, after each token.

        Raises:
            ValueError: for a conversation that a style cannot render, or that is longer than the model's context.
        """
        asked = {
            name: [
                Prompt(prompts.render(self.records[name], turns), bool(self.records[name]["add_special_tokens"]))
                for turns in each
            ]
            for name, each in conversations.items()
        }
        for each in asked.values():
            self.generator.lengths(each)
        found: dict[str, list[Generation]] = {name: [Generation("", 0, "")] * len(each) for name, each in asked.items()}

        def keep(name: str, i: int, said: Generation) -> None:
            found[name][i] = said

        self.generator(
            asked, max_new_tokens=self.max_new_tokens, stops=(), on_done=keep, on_text=on_text, pick=self.pick
        )
        return found


def add_options(parser: CommandParser) -> None:
    """Add what both commands take."""
    add = parser.add_argument
    add("source", metavar="RUN_OR_ADAPTER", help=SOURCE_HELP)
    add("--compare", default="", metavar="A,B", help="also these, side by side: names in the run, NAME=DIR, or base")
    add("--base", metavar="MODEL", help=NAMED_BASE_HELP)
    add("--dtype", choices=list(DTYPES), default="auto", help="of the base model")
    add("--prompt_style", help=f"for adapters without a {PROMPT_NAME}; default: chat where the base has a template")
    add("--system", metavar="TEXT", help="a system turn before the first request")
    add("--max_new_tokens", type=int, default=512, help="of one answer")
    sampling = parser.add_argument_group("sampling", "greedy by default, the words as in transformers")
    add = sampling.add_argument
    add("--temperature", type=float, default=0.0, help="above 0 the next token is drawn at random")
    add("--top_k", type=int, default=0, help="of the k most likely tokens; 0 is all")
    add("--top_p", type=float, default=1.0, help="of the most likely tokens that together have this probability")
    add("--seed", type=int, default=0, help="of the draws")


def set_up_speakers(arguments: Mapping[str, Any], console: Console) -> Speakers:
    """Load the base model and the adapters.

    Args:
        arguments: of :func:`add_options`.
        console: for people.

    Raises:
        ValueError: for a request that cannot be carried out; ``AdapterError`` for folders that cannot be read.
    """
    keys = ("temperature", "top_k", "top_p", "seed")
    pick = Sampling(**{key: arguments[key] for key in keys}).picker()
    if arguments["max_new_tokens"] < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {arguments['max_new_tokens']}")
    others = _names(arguments["compare"])
    choice = choose_adapters(arguments["source"]).with_named(others)
    notes = [f"{choice.first} answers, {choice.why}"] if choice.why else []
    for word in others:
        if word not in (*choice.folders, BASE) and "/" not in word and "=" not in word and not Path(word).exists():
            there = ", ".join((*choice.folders, BASE))
            raise ValueError(f"--compare {word} is neither one of {there} nor a folder, hub id or NAME=DIR")
    whole = choice.folders[choice.first]
    if is_model(whole):
        if others or arguments["base"] is not None:
            raise ValueError(f"{whole} is a whole model, which is asked alone: leave out --compare and --base")
        participants, shown = Participants([], str(whole)), [BASE]
    else:
        folders = {choice.first: whole} | {name: choice.folders[name] for name in others if name in choice.folders}
        adapters = [f"{name}={folder}" for name, folder in folders.items()]
        adapters += [word for word in others if word not in choice.folders and word != BASE]
        participants = Participants(adapters, arguments["base"], with_base=BASE in others)
        shown = list(dict.fromkeys([choice.first, *(word.partition("=")[0] for word in others)]))
    style, note = _fallback_style(arguments["prompt_style"], whole, arguments["base"])
    participants = Participants(participants.adapters, participants.base_model, participants.with_base, style)
    setup = from_folders(participants, prompts, console, dtype=arguments["dtype"], batch_size=16)
    assert isinstance(setup.generator, StackGenerator)
    records = {candidate.name: candidate.settings["prompt"] for candidate in setup.candidates}
    full = {
        name: prompts.prompt_record(record, setup.generator.tokenizer) if isinstance(record, str) else record
        for name, record in records.items()
    }
    order = [name for name in shown if name in full] + [name for name in full if name not in shown]
    return Speakers(
        setup.generator,
        {name: full[name] for name in order},
        pick,
        arguments["max_new_tokens"],
        [*notes, *([note] if note else [])],
    )


def _names(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _fallback_style(given: str | None, folder: Path, base: str | None) -> tuple[str | None, str | None]:
    """Return the style of those that do not say how they were trained, and a sentence about it if one does not."""
    if (folder / PROMPT_NAME).is_file():
        return given, None
    named = base or (base_model_of(folder) if (folder / CONFIG_NAME).is_file() else str(folder))
    style = given or (CHAT if isinstance(load_tokenizer(named).chat_template, str) else PLAIN)
    how = "by choice" if given else "--prompt_style takes another"
    return style, f"{folder} does not say in which style it was trained; it is asked in the style {style} ({how})"


def opening(system: str | None) -> list[Turn]:
    """Return the turns with which a conversation begins."""
    return [] if system is None else [Turn("system", system)]
