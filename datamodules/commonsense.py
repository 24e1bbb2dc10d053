"""Commonsense-170k: eight multiple-choice tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from seedlora.datamodules.prompts import Turn, exchange
from seedlora.datamodules.row_forms import text_column
from seedlora.datamodules.table import TableDataModule


class Commonsense170k(TableDataModule):
    """``ft-training_set/commonsense_170k.json`` of the LLM-Adapters repository, Hu et al., arXiv 2304.01933.

    Columns ``instruction``, ``input`` (empty) and ``output`` ("the correct answer is X"). It is on GitHub, not on the
    hub: give its ``path``. LLM-Adapters trains on the prompt too and cuts at 256 tokens (``max_length: 256``); it pads
    on the left, which changes nothing that is trained on.
    """

    own_style = "llm_adapters"
    other_columns = frozenset({"answer"})

    def turns(self, row: Mapping[str, Any]) -> Sequence[Turn]:
        """Return the instruction, with its input if there is one, and the output."""
        return exchange(
            text_column(row, "instruction"),
            text_column(row, "output"),
            text_column(row, "input") if row.get("input") else "",
        )
