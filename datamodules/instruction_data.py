"""Train on a user's own file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from seedlora.datamodules.conversations import Turn
from seedlora.datamodules.row_forms import PAIRS, conversation_of, is_chat, tools_of
from seedlora.datamodules.table import TableDataModule


class InstructionData(TableDataModule):
    """A user's own rows, whose form is told by their columns: :mod:`seedlora.datamodules.row_forms`.

    - a request and a response: ``{"prompt": ..., "response": ...}``, the names of Alpaca, Dolly and Orca, or others by
      ``prompt_field`` and ``response_field``; ``input`` or ``context``, ``system`` and ``history`` are read too
    - a chat: ``{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}``, or
      ShareGPT's ``{"conversations": [{"from": "human", "value": ...}, ...]}``; ``tools``, calls of tools and reasoning
      where the chat template can write them; a turn with ``weight: 0`` or ``train: false`` is not trained on
    - TRL's ``{"prompt": [...], "completion": [...]}``, of which the completion is trained on

    Args:
        path: a file as :mod:`seedlora.datamodules.row_files` reads it, or a folder with such files.
        prompt_field: where the request is.
        response_field: where the response is.
        val_fraction: part of the rows set aside for validation.
        test_fraction: part set aside for the test.
        options: those of :class:`~seedlora.datamodules.table.TableDataModule`.
    """

    own_style = "auto"

    def __init__(
        self,
        path: str,
        *,
        prompt_field: str = "prompt",
        response_field: str = "response",
        val_fraction: float = 0.05,
        test_fraction: float = 0.1,
        **options: Any,
    ) -> None:
        self.own_pair = None if (pair := (prompt_field, response_field)) == PAIRS[0] else pair
        super().__init__(path, val_fraction=val_fraction, test_fraction=test_fraction, **options)

    def turns(self, row: Mapping[str, Any]) -> Sequence[Turn]:
        """Return the conversation, by the columns that are there."""
        return conversation_of(row, self.own_pair)

    def tools(self, row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        """Return what is in the column ``tools``."""
        return tools_of(row)

    def holds_chats(self) -> bool:
        """Return whether the first row that can be read is a chat."""
        return self.own_pair is None and is_chat(self._first_row)

    @cached_property
    def _first_row(self) -> Mapping[str, Any]:
        return next((row.value for row in self.source.rows() if not row.error), {})
