"""MetaMathQA: 395,000 rewritten GSM8K and MATH problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from seedlora.datamodules.prompts import Turn, exchange
from seedlora.datamodules.row_forms import text_column
from seedlora.datamodules.table import TableDataModule


class MetaMathQA(TableDataModule):
    r"""`meta-math/MetaMathQA <https://huggingface.co/datasets/meta-math/MetaMathQA>`_ (MIT), 395,000 rows.

    Columns ``query`` and ``response``, which ends ``#### N\nThe answer is: N``; Yu et al., arXiv 2309.12284. MetaMath's
    own code splits a query at its first newline into instruction and input, which is ``style: alpaca_split``; most
    later work does not.

    Several rows are versions of one problem, so validation rows have relatives among the training rows: the validation
    loss compares adapters, but says little about new problems.
    """

    hub = "meta-math/MetaMathQA"
    other_columns = frozenset({"original_question", "type"})

    def turns(self, row: Mapping[str, Any]) -> Sequence[Turn]:
        """Return query and response."""
        return exchange(text_column(row, "query"), text_column(row, "response"))
