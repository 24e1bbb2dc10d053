"""The command ``preview``: show rows of a data set as a model will see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from seedlora.datamodules.preview import main as preview
from seedlora.datamodules.preview import make_parser as make_preview_parser
from seedlora.model.attention import AUTO, reason_not_to_pack
from seedlora.model.embedded import EMBEDDED
from seedlora.model.loading import load_config, load_tokenizer, positions_of

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    return preview(
        argv,
        load_tokenizer=load_tokenizer,
        default_model=EMBEDDED,
        load_positions=lambda model: positions_of(load_config(model)),
        reason_not_to_pack=lambda model: reason_not_to_pack(load_config(model).get_text_config(), AUTO, compiled=False),
    )


def make_parser() -> ArgumentParser:
    """Make the parser of the command."""
    return make_preview_parser(EMBEDDED)
