"""The command ``preview``: show rows of a data set as a model will see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from seedlora.datamodules.preview import main as preview
from seedlora.datamodules.preview import make_parser as make_preview_parser
from seedlora.model.attention import AUTO, reason_not_to_pack
from seedlora.model.embedded import EMBEDDED
from seedlora.model.loading import check_token_ids, load_config, load_tokenizer, positions_of

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from seedlora.datamodules import InstructionDataModule


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    return preview(
        argv,
        load_tokenizer=load_tokenizer,
        default_model=EMBEDDED,
        problems_of=_problems,
        reason_not_to_pack=lambda model: reason_not_to_pack(load_config(model).get_text_config(), AUTO, compiled=False),
    )


def _problems(model: str, data: InstructionDataModule) -> list[str]:
    """Return why a model would not be trained on rows, as ``train.py`` says it before it trains."""
    config = load_config(model)
    vocabulary = config.get_text_config(decoder=True).vocab_size
    found = []
    for check in (
        lambda: data.check_positions(positions_of(config)),
        lambda: check_token_ids(data.largest_token(), vocabulary, model),
    ):
        try:
            check()
        except ValueError as error:
            found.append(str(error))
    return found


def make_parser() -> ArgumentParser:
    """Make the parser of the command."""
    return make_preview_parser(EMBEDDED)
