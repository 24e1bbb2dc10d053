"""The losses of the tokens that are scored.

Shape legend: ``M`` rows of a forward, ``T`` tokens, ``S`` scored tokens, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from seedlora.model.attention import Documents, SharedPrefix
from seedlora.model.head_losses import head_losses, is_frozen_matrix

if TYPE_CHECKING:
    from peft import PeftModel

    from seedlora.adapters.stack import AdapterStack

IGNORED = -100


class NextTokens(NamedTuple):
    """Says which tokens are scored, and where they are predicted: at the position before each.

    Attributes:
        targets: their ids.
        keep: the positions that predict one.
        at: these positions, in the rows one after the other.
    """

    targets: Int[Tensor, " S"]
    keep: Bool[Tensor, "M T"]
    at: Int[Tensor, " S"]

    def scatter(self, losses: Float[Tensor, " S"], likely: Int[Tensor, " S"] | None) -> TokenScores:
        """Put losses and tokens at the positions that predict, 0, True and -1 elsewhere."""
        right = torch.ones_like(self.keep)
        tokens = torch.full_like(self.keep, -1, dtype=torch.long)
        if likely is not None:
            right = right.flatten().index_put((self.at,), likely == self.targets).view(self.keep.shape)
            tokens = tokens.flatten().index_put((self.at,), likely).view(self.keep.shape)
        losses = losses.new_zeros(self.keep.numel()).index_put((self.at,), losses).view(self.keep.shape)
        return TokenScores(losses, right, self.keep, tokens)


def next_tokens(labels: Int[Tensor, "M T"]) -> NextTokens:
    """Find the tokens that have a label.

    How many there are is what a GPU's host has to wait for; with their positions at hand, nothing that follows asks
    again, as a mask would in each use and once more in the backward pass.
    """
    following = labels.roll(-1, dims=1)
    keep = following != IGNORED
    keep[:, -1] = False
    at = keep.flatten().nonzero()[:, 0]
    return NextTokens(following.flatten()[at], keep, at)


class TokenScores(NamedTuple):
    """Holds the scores of labels by position, shifted by one: position ``t`` predicts the label of ``t + 1``.

    Attributes:
        losses: negative log-likelihood of the label, 0 where there is none.
        right: whether the label is the most likely token; True where there is none, or nobody asked.
        keep: whether there is a label.
        likely: the most likely token; -1 where there is no label, or nobody asked.
    """

    losses: Float[Tensor, "M T"]
    right: Bool[Tensor, "M T"]
    keep: Bool[Tensor, "M T"]
    likely: Int[Tensor, "M T"]


class KeptScores(NamedTuple):
    """Holds what :class:`TokenScores` holds, of the scored tokens alone; ``likely`` is None if nobody asked."""

    losses: Float[Tensor, " S"]
    likely: Int[Tensor, " S"] | None


class TokenLosses:
    """Scores labels under the adapters that a stack is routed to.

    Args:
        model: with the adapters.
        stack: of them.
        module: calls :meth:`forward`: the LightningModule, at whose hooks ZeRO-3 begins another pass.
    """

    def __init__(self, model: PeftModel, stack: AdapterStack, module: Callable[..., Tensor]) -> None:
        self._model, self._stack, self._module = model, stack, module
        #: Whether nothing follows the head; unknown until the first forward.
        self.head_is_last: bool | None = None

    def __call__(
        self,
        input_ids: Int[Tensor, "M T"],
        labels: Int[Tensor, "M T"],
        position_ids: Int[Tensor, "M T"] | None = None,
        documents: Documents | SharedPrefix | None = None,
        *,
        greedy: bool = True,
    ) -> TokenScores:
        """Score the labels.

        Args:
            input_ids: as :meth:`logits` takes them.
            labels: token ids; :data:`IGNORED` where nothing is scored.
            position_ids: likewise.
            documents: likewise.
            greedy: whether to tell which token is the most likely.
        """
        tokens = next_tokens(labels)
        return tokens.scatter(*self._kept_scores(input_ids, tokens, position_ids, documents, greedy=greedy))

    def logits(
        self,
        input_ids: Int[Tensor, "M T"],
        keep: Bool[Tensor, "M T"],
        position_ids: Int[Tensor, "M T"] | None = None,
        documents: Documents | SharedPrefix | None = None,
    ) -> Float[Tensor, "S V"]:
        """Return the logits at the positions kept, one after the other.

        Args:
            input_ids: rows padded on the right.
            keep: whose next-token logits are wanted.
            position_ids: for rows that hold several samples: they restart with each, and attention stays within one.
                transformers makes its masks so when it is given positions and no mask.
            documents: of one row that has no padding, or that begin alike in each row; their attention needs no mask
                then.
        """
        return self._module(input_ids, keep, position_ids, documents)

    def forward(
        self,
        input_ids: Tensor,
        keep: Tensor,
        position_ids: Tensor | None = None,
        documents: Documents | SharedPrefix | None = None,
    ) -> Float[Tensor, "S V"]:
        """Compute what :meth:`logits` returns; the LightningModule calls it."""
        at = keep.flatten().nonzero()[:, 0]
        with self._stack.head_sees(keep):
            return self._logits_behind(lambda hidden: hidden.flatten(0, 1)[at], input_ids, position_ids, documents)

    @property
    def _head(self) -> nn.Module:
        head: nn.Module = self._model.get_base_model().get_output_embeddings()
        return head

    def _logits_behind(
        self,
        before_head: Callable[[Tensor], Tensor],
        input_ids: Tensor,
        position_ids: Tensor | None,
        documents: Documents | SharedPrefix | None,
    ) -> Float[Tensor, "S V"]:
        """Return the model's logits of the hidden states that ``before_head`` lets through.

        The head is the largest layer of a small model, so it only sees what is scored: a hook gathers the hidden
        states in front of it, into one contiguous matrix, and every model family keeps its own code around the head.
        """
        hook = self._head.register_forward_pre_hook(lambda _, args: (before_head(args[0]), *args[1:]))
        try:
            if position_ids is None:
                return self._model(input_ids=input_ids).logits
            given = {} if documents is None else {"documents": documents}
            return self._model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **given).logits
        finally:
            hook.remove()

    def _kept_scores(
        self,
        input_ids: Tensor,
        tokens: NextTokens,
        position_ids: Tensor | None,
        documents: Documents | SharedPrefix | None,
        *,
        greedy: bool,
    ) -> KeptScores:
        """Score the tokens from chunks of logits where the model's logits are those of its head.

        Some families scale or cap them afterwards. So the model runs with its head on one position, and what comes out
        is compared with the head alone; from the first difference on, the family's own code sees all positions.
        """
        targets, keep, at = tokens
        head = self._head
        if self.head_is_last is not False and is_frozen_matrix(head) and len(targets):
            caught: list[Tensor] = []

            def catch(hidden: Tensor) -> Tensor:
                caught.append(hidden.flatten(0, 1)[at])
                return caught[0][:1].detach()

            logits = self._logits_behind(catch, input_ids, position_ids, documents)
            if self.head_is_last is None:
                with torch.no_grad():
                    self.head_is_last = torch.equal(logits.float(), head(caught[0][:1]).float())
            if self.head_is_last:
                assert isinstance(head, nn.Linear)
                return KeptScores(*head_losses(caught[0], head, targets, greedy=greedy))
        logits = self.logits(input_ids, keep, position_ids, documents)
        losses = cross_entropy(logits.float(), targets, reduction="none")
        return KeptScores(losses, logits.argmax(-1) if greedy else None)
