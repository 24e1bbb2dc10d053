"""Score adapters on rows.

Shape legend: ``N`` adapters and mixtures scored, ``b`` rows of a batch, ``T`` tokens, ``I`` rows in all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torchmetrics import CatMetric

from seedlora.model.attention import SharedPrefix
from seedlora.model.loading import eval_mode
from seedlora.scores.row_scores import RowScores
from seedlora.training.live_updates import load_updates
from seedlora.training.losses import IGNORED, TokenLosses, TokenScores, next_tokens
from seedlora.updates.stacks import Layers

if TYPE_CHECKING:
    from peft import PeftModel

    from seedlora.adapters.stack import AdapterStack

#: Adapters that are scored in one forward.
ADAPTERS_PER_FORWARD = 8
#: Tokens that rows must begin with alike so that these go through the model once.
LEAST_PREFIX = 4


@dataclass(frozen=True)
class ScoredLabels:
    """Says what is scored, under which labels.

    Args:
        adapters: the adapter of the stack by label; ``None`` is the base model.
        mixtures: further labels, each with the labels of its members: the mean of their next-token probabilities.
    """

    adapters: Mapping[str, str | None] = field(default_factory=dict)
    mixtures: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def labels(self) -> tuple[str, ...]:
        """Return all labels, in the order in which they are scored."""
        return (*self.adapters, *self.mixtures)


class BatchScores(NamedTuple):
    """Holds the scores of one batch, per label and row.

    Attributes:
        losses: summed over the supervised tokens of the row.
        correct: whether greedy decoding would give the response exactly. That needs no generation: it does so if and
            only if each token of the response, the end token included, is the most likely one after the true tokens
            before it.
        tokens: supervised ones.
        likely: at each position the most likely next token after the true ones; -1 where none is scored.
    """

    losses: Float[Tensor, "N b"]
    correct: Bool[Tensor, "N b"]
    tokens: Int[Tensor, "N b"]
    likely: Int[Tensor, "N b T"]


#: Takes a batch, labels, and what the batch says of each.
OnScores: TypeAlias = Callable[[Mapping[str, Tensor], Sequence[str], BatchScores], None]


def keep_nothing(batch: Mapping[str, Tensor], labels: Sequence[str], scores: BatchScores) -> None:
    """Take the scores of a batch for nothing but their sums."""


def common_prefix(ids: Int[Tensor, "b T"], labels: Int[Tensor, "b T"]) -> int:
    """Count the tokens that all rows begin with, as long as nothing is scored in them or at the token after them."""
    if len(ids) == 1:
        return 0
    alike = (ids == ids[0]).all(0) & (labels == IGNORED).all(0)
    return max(0, int(alike.cumprod(0).sum()) - 1)


def real_items(items: Tensor) -> Int[Tensor, " I"]:
    """Return where the items are, in their order; those that fill up the shares of the ranks have negative numbers."""
    order = items.argsort()
    return order[items[order] >= 0]


@dataclass(frozen=True)
class Scorer:
    """Scores the adapters of a stack on rows.

    Args:
        model: with the adapters.
        stack: of them.
        token_losses: under what the stack is routed to.
        device: of the model.
        gather: puts the rows of all ranks one after the other.
        shares_prefix: whether tokens that all rows of a batch begin with go through the model once for each adapter.
    """

    model: PeftModel
    stack: AdapterStack
    token_losses: TokenLosses
    device: torch.device
    gather: Callable[[Tensor], Tensor]
    shares_prefix: bool = False

    def score(self, batch: Mapping[str, Tensor], scored: ScoredLabels) -> BatchScores:
        """Score every label on the same rows, :data:`ADAPTERS_PER_FORWARD` adapters in one pass over the base model.

        Args:
            batch: ``input_ids`` and ``labels``, of shape (b, T).
            scored: what to score.
        """
        ids, labels = batch["input_ids"], batch["labels"]
        names = list(scored.adapters.values())
        groups = [names[i : i + ADAPTERS_PER_FORWARD] for i in range(0, len(names), ADAPTERS_PER_FORWARD)]
        parts = [self._score_adapters(ids, labels, group) for group in groups]
        mixtures = [[scored.adapters[member] for member in members] for members in scored.mixtures.values()]
        parts += [self._score_mixture(ids, labels, mixture) for mixture in mixtures]
        return BatchScores(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _score_adapters(self, ids: Tensor, labels: Tensor, names: Sequence[str | None]) -> BatchScores:
        n = len(names)
        self.stack.route(names)
        if self.shares_prefix and (prefix := common_prefix(ids, labels)) >= LEAST_PREFIX:
            return _by_row(self._scores_after_prefix(ids, labels, n, prefix), n)
        return _by_row(self.token_losses(ids.repeat(n, 1), labels.repeat(n, 1)), n)

    def _scores_after_prefix(self, ids: Tensor, labels: Tensor, n: int, prefix: int) -> TokenScores:
        """Score rows that begin alike, ``n`` times: each row of the forward holds the beginning, and then what follows
        it in each of them.
        """
        rows, tokens = ids.shape
        places = torch.arange(tokens, device=ids.device)
        row = torch.cat([ids[0, :prefix], ids[:, prefix:].flatten()])
        wanted = torch.cat([labels[0, :prefix], labels[:, prefix:].flatten()])
        positions = torch.cat([places[:prefix], places[prefix:].repeat(rows)])
        row, wanted, positions = (each.expand(n, -1) for each in (row, wanted, positions))
        found = self.token_losses(row, wanted, positions, SharedPrefix(prefix, documents=rows))

        def whole(each: Tensor, empty: float) -> Tensor:
            rest = each[:, prefix:].reshape(n * rows, -1)
            return torch.cat([rest.new_full((n * rows, prefix), empty), rest], dim=1)

        losses, right, keep, likely = found
        return TokenScores(whole(losses, 0), whole(right, True), whole(keep, False), whole(likely, -1))

    def _score_mixture(self, ids: Tensor, labels: Tensor, names: Sequence[str | None]) -> BatchScores:
        r"""Score a mixture of adapters by a forward of each, whose whole logits are needed.

        Its probability of a token is the mean of the adapters' after the same true tokens:
        :math:`p(t) = \frac1N \sum_n p_n(t)`.
        """
        tokens = next_tokens(labels)
        mixed_SV = None
        for name in names:
            self.stack.route([name])
            logp_SV = self.token_losses.logits(ids, tokens.keep).float().log_softmax(-1)
            mixed_SV = logp_SV if mixed_SV is None else torch.logaddexp(mixed_SV, logp_SV)
        assert mixed_SV is not None
        losses = math.log(len(names)) - mixed_SV.gather(1, tokens.targets[:, None])[:, 0]
        return _by_row(tokens.scatter(losses, mixed_SV.argmax(-1)), 1)

    @torch.no_grad()
    def score_rows(
        self,
        adapters: Mapping[str, Layers],
        batches: Iterable[Mapping[str, Tensor]],
        *,
        on_scores: OnScores = keep_nothing,
    ) -> dict[str, RowScores]:
        """Score adapters that need not be in the stack, all of them held at once. All ranks must call it.

        Args:
            adapters: by label; each is one adapter by layer path.
            batches: as :meth:`score_batches` takes them.
            on_scores: called with each batch, the labels and their scores on this rank.

        Returns:
            By label, over all rows of all ranks in the order of their numbers.
        """
        for label, layers in adapters.items():
            load_updates(self.stack, label, layers)
        try:
            return self.score_batches(batches, ScoredLabels({label: label for label in adapters}), on_scores=on_scores)
        finally:
            for label in adapters:
                self.stack.unload(label)

    @torch.no_grad()
    def score_batches(
        self,
        batches: Iterable[Mapping[str, Tensor]],
        scored: ScoredLabels,
        *,
        on_scores: OnScores = keep_nothing,
    ) -> dict[str, RowScores]:
        """Score what is in the stack, in eval mode. All ranks must call it.

        Args:
            batches: ``input_ids`` and ``labels`` (b, T), and ``items`` (b,), the numbers of the rows; a row with a
                negative one is not counted.
            scored: what to score.
            on_scores: called with each batch, the labels and their scores on this rank.

        Returns:
            By label, over all rows of all ranks in the order of their numbers.
        """
        columns = []
        with eval_mode(self.model):
            for given in batches:
                batch = {key: value.to(self.device) for key, value in given.items()}
                scores = self.score(batch, scored)
                columns.append(rows_of_batch(batch, scores))
                on_scores(batch, scored.labels, scores)
        return self.all_rows(columns, scored.labels)

    def all_rows(self, parts: Sequence[Tensor], labels: Sequence[str]) -> dict[str, RowScores]:
        """Put the rows of all batches and ranks together. All ranks must call it.

        Args:
            parts: of this rank, as :func:`rows_of_batch` makes them.
            labels: of what was scored.
        """
        table = self.gather(torch.cat([*parts]))
        table = table[real_items(table[:, 0])].cpu()
        tokens, n = table[:, 1].long(), len(labels)
        return {label: RowScores(table[:, 2 + i], table[:, 2 + n + i] > 0, tokens) for i, label in enumerate(labels)}


def rows_of_batch(batch: Mapping[str, Tensor], scores: BatchScores) -> Float[Tensor, "b columns"]:
    """Return the scores of a batch with a line for each row: number, tokens, then losses and matches by label."""
    return torch.cat([batch["items"][None], scores.tokens[:1], scores.losses, scores.correct]).T


def _by_row(scores: TokenScores, n: int) -> BatchScores:
    """Sum up the scores of each row; the rows are those of ``n`` labels, one block after the other."""
    losses, right, keep, likely = scores
    likely = likely.view(n, -1, likely.shape[1])
    return BatchScores(losses.sum(1).view(n, -1), right.all(1).view(n, -1), keep.sum(1).view(n, -1), likely)


class MatchedRows(NamedTuple):
    """Holds the rows of a test, on all ranks, in the order of their numbers.

    Attributes:
        items: the numbers of the rows; not all, if the trainer limits the batches.
        correct: whether the label of each column answers the row exactly.
    """

    items: Int[Tensor, " I"]
    correct: Bool[Tensor, "I N"]


class ExactMatches(nn.Module):
    """Collects which labels answer which rows of a test exactly, over batches and ranks."""

    def __init__(self) -> None:
        super().__init__()
        self._correct, self._items = CatMetric(), CatMetric()

    def reset(self) -> None:
        """Forget an earlier test."""
        self._correct.reset()
        self._items.reset()

    def add(self, items: Int[Tensor, " b"], correct: Bool[Tensor, "N b"]) -> None:
        """Add the rows of a batch.

        Args:
            items: their numbers; those with a negative one are not counted.
            correct: as in :class:`BatchScores`.
        """
        self._correct.update(correct.T.float())
        self._items.update(items)

    def rows(self) -> MatchedRows:
        """Return the rows of all ranks. All ranks must call it."""
        items = self._items.compute().long().view(-1)
        order = real_items(items)
        return MatchedRows(items[order], self._correct.compute().view(len(items), -1)[order] > 0)
