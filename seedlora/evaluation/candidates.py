"""Name the adapters that are scored, and turn requests into the prompts of each."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Unpack

from seedlora.adapters.adapter import PROMPT_NAME, adapter_sha256, locate, quantization_of
from seedlora.adapters.reading import base_model_of
from seedlora.datamodules.conversations import Turn
from seedlora.evaluation.generate import Prompt
from seedlora.evaluation.samples import Candidate
from seedlora.model.quantization import check_quantization
from seedlora.names import BASE
from seedlora.records.evaluation import WeightSettings
from seedlora.utils.plain_data import from_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_STYLE = "alpaca"


class Prompts(Protocol):
    """Turns requests into prompts; ``seedlora.datamodules.prompts`` is one, handed over by whoever starts it."""

    def render(self, style: str | Mapping[str, object], turns: str | tuple[Turn, ...]) -> str:
        """Return the text after which the model answers."""

    def prompt_record(self, style: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
        """Return a style with all it takes from the tokenizer, as plain data."""


def make_candidate(
    name: str, record: str | Mapping[str, object], prompts: Prompts, **settings: Unpack[WeightSettings]
) -> Candidate:
    """Make a candidate that answers prompts of a style.

    Args:
        name: how results call it.
        record: a style's record, or its name.
        prompts: renders it.
        settings: what else identifies it.
    """
    special = True if isinstance(record, str) else bool(record.get("add_special_tokens", True))

    def prompt(request: str | tuple[Turn, ...], prefix: str) -> Prompt:
        return Prompt(prompts.render(record, request) + prefix, special)

    return Candidate(name, prompt, {"prompt": record if isinstance(record, str) else dict(record), **settings})


@dataclass(frozen=True)
class NamedAdapter:
    """An adapter as the command line names it; without a folder if only a server has it."""

    name: str
    folder: Path | None

    @property
    def prompt(self) -> dict[str, object] | None:
        """Return the prompt style that it was trained with, if its folder says.

        Raises:
            ValueError: if the folder's record of it is broken.
        """
        return None if self.folder is None else _read_prompt(self.folder)

    @property
    def quantization(self) -> str:
        """Return what its base model has to be quantised to."""
        return "none" if self.folder is None else quantization_of(self.folder)


def _read_prompt(folder: Path) -> dict[str, object] | None:
    """Return the record of the prompt style in a folder of an adapter or a model; None if it has none."""
    if not (file := folder / PROMPT_NAME).is_file():
        return None
    try:
        record = from_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{file} holds a {type(record).__name__}, not a record of the training")
    return record


def name_adapters(sources: Sequence[str], *, served: bool) -> list[NamedAdapter]:
    """Resolve adapters that are given as ``NAME=DIR``, as a folder or hub id, or as a name that a server knows.

    Args:
        sources: as given.
        served: a name without a folder is a server's.

    Raises:
        ValueError: if two have one name, or one has that of the base model; ``AdapterError`` if a folder is missing.
    """
    adapters: dict[str, NamedAdapter] = {}
    for given in sources:
        name, equals, source = given.partition("=") if not Path(given).exists() else ("", "", given)
        source = source if equals else given
        if served and not equals and not Path(source).exists():
            adapter = NamedAdapter(given, None)
        else:
            folder = locate(source)
            adapter = NamedAdapter(name if equals else folder.resolve().name, folder)
        if adapter.name in adapters or adapter.name == BASE:
            why = "is the base model's own name" if adapter.name == BASE else "is given twice"
            raise ValueError(f"adapter name '{adapter.name}' {why}; name adapters by --adapter NAME=DIR")
        adapters[adapter.name] = adapter
    return list(adapters.values())


def shared_base_model(adapters: Sequence[NamedAdapter], given: str | None) -> str:
    """Return the base model that is given, or else the one that all adapters name.

    Raises:
        ValueError: if they do not name one and the same; ``AdapterError`` for a configuration that cannot be read.
    """
    if given is not None:
        return given
    names = {}
    for adapter in adapters:
        if adapter.folder is not None:
            names[base_model_of(adapter.folder)] = adapter.name
    if len(names) != 1 or "" in names:
        told = "; ".join(f"{name}: {base or 'none'}" for base, name in names.items())
        raise ValueError(f"the adapters do not name one base model ({told or 'none'}); give --base_model")
    return next(iter(names))


def shared_quantization(adapters: Sequence[NamedAdapter]) -> str:
    """Return what the one base model of all adapters has to be quantised to.

    Raises:
        ValueError: if the adapters do not agree, or bitsandbytes is needed and not installed.
    """
    by_kind: dict[str, list[str]] = {}
    for adapter in adapters:
        by_kind.setdefault(adapter.quantization, []).append(adapter.name)
    if len(by_kind) > 1:
        told = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in by_kind.items())
        raise ValueError(f"the adapters belong on base models of different quantization ({told}); score them apart")
    kind = next(iter(by_kind), "none")
    check_quantization(kind)
    return kind


def make_candidates(
    adapters: Sequence[NamedAdapter],
    *,
    with_base: bool,
    style: str | None,
    prompts: Prompts,
    tokenizer: Callable[[], PreTrainedTokenizerBase],
    model: Path | None = None,
) -> list[Candidate]:
    """Make candidates of the adapters, each with the prompts of its training, or else of a style.

    Args:
        adapters: as :func:`name_adapters` gives them.
        with_base: put the base model before them. It is asked as the adapters are, if they agree.
        style: for those that do not say how they were trained. Default: :data:`DEFAULT_STYLE`.
        prompts: renders the styles.
        tokenizer: gives the base model's, which the style ``chat`` needs.
        model: the base model's folder, which may say how it was trained.

    Raises:
        ValueError: for an unknown style, or a record that is broken.
    """
    fallback: str | dict[str, object] = style or DEFAULT_STYLE
    if fallback == "chat":
        fallback = prompts.prompt_record(fallback, tokenizer())
    prompts.render(fallback, "")
    records = {adapter.name: adapter.prompt for adapter in adapters}
    agreed = {json.dumps(record, sort_keys=True) for record in records.values()}
    shared = next(iter(records.values())) if len(agreed) == 1 else None
    candidates = []
    if with_base:
        trained_with = shared or NamedAdapter(BASE, model).prompt
        candidates.append(make_candidate(BASE, trained_with or fallback, prompts))
    for adapter in adapters:
        sha256 = None if adapter.folder is None else adapter_sha256(adapter.folder)
        record = records[adapter.name] or fallback
        candidates.append(make_candidate(adapter.name, record, prompts, weights_sha256=sha256))
    return candidates
