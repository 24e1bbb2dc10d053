"""Tülu v2: a mixture of instruction data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from seedlora.datamodules.prompts import Turn
from seedlora.datamodules.row_forms import turns_column
from seedlora.datamodules.table import TableDataModule


class Tulu(TableDataModule):
    """`tulu-v2-sft-mixture <https://huggingface.co/datasets/allenai/tulu-v2-sft-mixture>`_ (ODC-BY), 326,154 rows.

    Chats in column ``messages``; Ivison et al., "Camels in a Changing Climate", arXiv 2311.10702. Every answer is
    trained on. Open-Instruct trains with 8,192 tokens; ``max_length`` says how many here.
    """

    hub = "allenai/tulu-v2-sft-mixture"
    own_style = "tulu"
    other_columns = frozenset({"dataset", "id"})

    def turns(self, row: Mapping[str, Any]) -> Sequence[Turn]:
        """Return the messages."""
        return turns_column(row)
