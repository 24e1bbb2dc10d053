"""Train on a user's own file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from seedlora.datamodules.prompts import Turn, exchange
from seedlora.datamodules.table import TableDataModule, messages_column, text_column


class InstructionData(TableDataModule):
    """A user's own rows, in one of three forms, told by their columns.

    - a request and a response: ``{"prompt": ..., "response": ...}``, or other names by ``prompt_field`` and
      ``response_field``
    - Alpaca's columns: ``{"instruction": ..., "input": ..., "output": ...}``; ``input`` may be absent or empty
    - a chat: ``{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}``

    Args:
        path: a ``.jsonl``, ``.json`` or ``.parquet`` file, or a folder with such files.
        prompt_field: where the request is.
        response_field: where the response is.
        val_fraction: part of the rows set aside for validation.
        test_fraction: part set aside for the test.
        options: those of :class:`~seedlora.datamodules.table.TableDataModule`.
    """

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
        self.fields = (prompt_field, response_field)
        super().__init__(path, val_fraction=val_fraction, test_fraction=test_fraction, **options)

    def turns(self, row: Mapping[str, Any]) -> Sequence[Turn]:
        """Return the conversation, by the columns that are there."""
        prompt, response = self.fields
        if prompt not in row and response not in row:
            if "messages" in row:
                return messages_column(row)
            if "instruction" in row:
                return exchange(
                    text_column(row, "instruction"),
                    text_column(row, "output"),
                    text_column(row, "input") if row.get("input") else "",
                )
            raise ValueError(
                f"neither {prompt} and {response}, nor instruction and output, nor messages are among its columns "
                f"{', '.join(sorted(map(str, row))) or '(none)'}; data.prompt_field and data.response_field name others"
            )
        return exchange(text_column(row, prompt), text_column(row, response))
