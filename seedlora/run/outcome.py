"""``results.json``: what a test said of each adapter.

Shape legend: ``I`` test items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from torch import Tensor

from seedlora.names import FUSED
from seedlora.records.results import RunResults
from seedlora.run.stack_data import HasDomains, HasRows
from seedlora.scores.intervals import sample_losses
from seedlora.scores.results import Results, results
from seedlora.scores.row_scores import RowScores


@dataclass
class Outcome:
    """Collect what a test says of adapters on the same items, and what some training rows say of them.

    Args:
        items: their numbers, ascending.
        correct: by label, which items an adapter answers exactly.
        train: by label, the scores on the training rows; empty if none were scored.
    """

    items: Int[np.ndarray, " I"]
    correct: dict[str, Bool[np.ndarray, " I"]]
    train: dict[str, RowScores] = field(default_factory=dict)

    @classmethod
    def of_test(cls, labels: Sequence[str], correct: Bool[Tensor, "I labels"], items: Int[Tensor, " I"]) -> Outcome:
        """Begin with the outcome of the test's own pass."""
        return cls(items.cpu().numpy(), dict(zip(labels, correct.cpu().numpy().T, strict=True)))

    def numbered_after(self, batches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return batches whose rows have numbers behind the test items'; negative ones, of no row, stay negative."""
        first = int(self.items[-1]) + 1
        return [{**batch, "items": batch["items"] + first * (batch["items"] >= 0)} for batch in batches]

    def add(self, scored: Mapping[str, RowScores]) -> None:
        """Add adapters by their scores on the test items and then on the training rows."""
        n = len(self.items)
        for label, rows in scored.items():
            self.correct[label], self.train[label] = rows[:n].correct.numpy(), rows[n:]

    def results(self, seeds: Sequence[str]) -> Results:
        """Compare the adapters; the fused one comes last, for whoever reads the table.

        Args:
            seeds: the labels that are single seeds.
        """
        labels = sorted(self.correct, key=lambda label: label == FUSED)
        correct = np.stack([self.correct[label] for label in labels], axis=1)
        return results(correct, labels, seeds, metric="exact match, greedy")

    def record(self, compared: Results, data: object) -> RunResults:
        """Return everything as plain data.

        Args:
            compared: what :meth:`results` returned.
            data: the data module, which may know the kinds of its items.
        """
        kinds = data.domains("test") if isinstance(data, HasDomains) else {}
        found = compared.to_record()
        found["domains"] = {kind: [values[item] for item in self.items] for kind, values in kinds.items()}
        if isinstance(data, HasRows) and data.rows:
            found["items_sha256"] = data.rows["test"].take(self.items).sha256()
        if any(len(scores.tokens) for scores in self.train.values()):
            found["train_sample"] = sample_losses({label: self.train[label] for label in compared.scores})
        return found
