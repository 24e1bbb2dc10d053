"""The command ``preview``: show rows of a data set as a model will see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from seedlora.datamodules.preview import main as preview
from seedlora.datamodules.preview import make_parser as make_preview_parser
from seedlora.model.embedded import EMBEDDED
from seedlora.model.loading import load_config, load_tokenizer

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser
    from transformers import PretrainedConfig


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    return preview(
        argv,
        load_tokenizer=load_tokenizer,
        default_model=EMBEDDED,
        load_positions=lambda model: positions_of(load_config(model)),
    )


def make_parser() -> ArgumentParser:
    """Make the parser of the command."""
    return make_preview_parser(EMBEDDED)


def positions_of(config: PretrainedConfig) -> int | None:
    """Return the number of positions of a model, None where its configuration names no limit."""
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None
