"""GSM8K: grade-school word problems with worked answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from seedlora.datamodules.prompts import Turn, exchange
from seedlora.datamodules.row_forms import text_column
from seedlora.datamodules.table import TableDataModule


class GSM8K(TableDataModule):
    r"""The training set of `openai/gsm8k <https://huggingface.co/datasets/openai/gsm8k>`_ (MIT), 7,473 rows.

    Columns ``question`` and ``answer``, which ends ``#### N``; Cobbe et al., arXiv 2110.14168. ``\nThe answer is: N``
    is put after it, as in MetaMathQA, because that is what the protocol ``paper`` looks for in an answer.
    """

    hub = "openai/gsm8k"
    subset = "main"

    def turns(self, row: Mapping[str, Any]) -> Sequence[Turn]:
        """Return the question, and the answer with its closing sentence."""
        answer = text_column(row, "answer")
        _, mark, number = answer.rpartition("#### ")
        if not mark:
            raise ValueError("the answer does not end with '#### N'")
        return exchange(text_column(row, "question"), f"{answer}\nThe answer is: {number.strip()}")
