"""Draw the next token from a model's logits, by the options that transformers' ``generate`` has for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Say how the next token is drawn.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: only the k most likely tokens; 0 is all.
        top_p: only the most likely tokens that together have this probability.
        seed: of the draws.

    Raises:
        ValueError: for a value out of range, or a limit that greedy answers would not read.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be a number of at least 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise ValueError("top_k and top_p limit what is drawn at random; give a temperature above 0 with them")

    def picker(self) -> Callable[[Tensor], Tensor] | None:
        """Return what draws a token of each row from logits of shape (M, V); None where it is the most likely one.

        The draws go on from the last ones, whatever is asked for: the same seed and requests give the same answers.
        """
        if self.temperature == 0:
            return None
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        warpers: list[Callable[[Tensor | None, Tensor], Tensor]] = [TemperatureLogitsWarper(self.temperature)]
        warpers += [TopKLogitsWarper(self.top_k)] if self.top_k else []
        warpers += [TopPLogitsWarper(self.top_p)] if self.top_p < 1 else []
        generator = torch.Generator().manual_seed(self.seed)

        def pick(logits_MV: Tensor) -> Tensor:
            scores = logits_MV.float()
            for warper in warpers:
                scores = warper(None, scores)
            drawn = torch.multinomial(scores.softmax(-1).cpu(), 1, generator=generator)
            return drawn[:, 0].to(logits_MV.device)

        return pick
