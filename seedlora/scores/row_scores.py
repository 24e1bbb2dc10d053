"""Hold the scores of rows."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RowScores:
    """Hold what one adapter says about the same rows as the others.

    Args:
        losses: negative log-likelihood of each row's response, summed over its tokens, in nats.
        correct: whether greedy decoding gives the response exactly.
        tokens: of each response.
    """

    losses: Float[Tensor, " I"]
    correct: Bool[Tensor, " I"]
    tokens: Int[Tensor, " I"]

    @property
    def loss(self) -> float:
        """Return the loss in nats per token, over all rows."""
        return float(self.losses.double().sum() / self.tokens.sum())

    @property
    def match(self) -> float:
        """Return the share of rows answered exactly."""
        return float(self.correct.double().mean())

    def __getitem__(self, rows: slice) -> RowScores:
        """Return what it says about some of the rows."""
        return RowScores(self.losses[rows], self.correct[rows], self.tokens[rows])
