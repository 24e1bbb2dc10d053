"""CodeFeedback: programming questions with answers, in one turn or in several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from seedlora.datamodules.prompts import Turn, exchange
from seedlora.datamodules.row_forms import text_column, turns_column
from seedlora.datamodules.table import TableDataModule


class CodeFeedback(TableDataModule):
    """Zheng et al., "OpenCodeInterpreter", arXiv 2402.14658 (Apache-2.0).

    ``m-a-p/CodeFeedback-Filtered-Instruction``, about 156,000 rows of one turn, columns ``query`` and ``answer``; or
    with ``multi_turn`` ``m-a-p/Code-Feedback``, about 68,000 chats in column ``messages``. They have no prompt of their
    own; ours is ``alpaca``.

    Args:
        path: a ``.jsonl``, ``.json`` or ``.parquet`` file, or a folder with such files; default: the hub.
        multi_turn: the chats instead of the single turns.
        options: those of :class:`~seedlora.datamodules.table.TableDataModule`.
    """

    hub = "m-a-p/CodeFeedback-Filtered-Instruction"
    hub_of_chats = "m-a-p/Code-Feedback"
    other_columns = frozenset({"id", "lang", "resource"})

    def __init__(self, path: str | None = None, *, multi_turn: bool = False, **options: Any) -> None:
        self.multi_turn = multi_turn
        if multi_turn:
            self.hub = self.hub_of_chats
        super().__init__(path, **options)

    def turns(self, row: Mapping[str, Any]) -> Sequence[Turn]:
        """Return query and answer, or the messages."""
        return turns_column(row) if self.multi_turn else exchange(text_column(row, "query"), text_column(row, "answer"))
