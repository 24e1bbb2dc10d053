"""Count the operations of a training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from seedlora.run.memory import trainable_parameters

if TYPE_CHECKING:
    from seedlora.training.model_options import ModelOptions


@dataclass(frozen=True)
class Work:
    """Hold how many weights a token passes in training.

    Args:
        body: frozen, in the linear layers.
        head: in front of the vocabulary.
        adapter: trained, of one replica, layers that are trained in full among them.
        head_trained: whether the head is.
    """

    body: int
    head: int
    adapter: int
    head_trained: bool = False

    def operations(self, *, tokens: int, scored: float, recomputed: bool = False) -> float:
        """Return the floating-point operations of forward and backward: 4 per frozen weight, 6 per trained one.

        Args:
            tokens: of the training.
            scored: of these, those that pass the head.
            recomputed: by gradient checkpointing: 2 more per weight of the layers.
        """
        body, adapter = (6, 8) if recomputed else (4, 6)
        return (
            tokens * (body * self.body + adapter * self.adapter) + scored * (6 if self.head_trained else 4) * self.head
        )


def work(options: ModelOptions) -> Work:
    """Count the weights that a token passes in training."""
    model = options.outline
    head = model.text_config.vocab_size * model.text_config.hidden_size
    full = options.full_modules
    sizes = {name: d * k for name, (d, k) in model.linear.items() if d != model.text_config.vocab_size}
    own = sum(size for name, size in sizes.items() if name in full)
    factors = trainable_parameters(options) - sum(full.values())
    return Work(sum(sizes.values()) - own, head, factors + own, model.head in full)
