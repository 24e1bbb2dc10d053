"""LoRA updates as factors: the one representation that every merge rule works on.

Shape legend: ``N`` adapters, ``D`` output features, ``K`` input features, ``R`` rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LoRAFactors:
    r"""The updates of ``N`` adapters to one linear layer, in factored form.

    .. math:: \Delta_n = B_n A_n

    The scaling (``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` for rsLoRA) is folded into ``B`` by
    whoever reads an adapter, so that everything behind this class has scale 1.

    Args:
        A: shape ``(N, R, K)``.
        B: shape ``(N, D, R)``, scaling included.

    Raises:
        ValueError: if the shapes do not fit together.

    Example:
        >>> import torch
        >>> stack = LoRAFactors(A=torch.randn(3, 8, 64), B=torch.randn(3, 32, 8))
        >>> len(stack), stack.rank, stack.shape
        (3, 8, (32, 64))
        >>> stack.dense().shape
        torch.Size([3, 32, 64])
    """

    A: Float[Tensor, "N R K"]
    B: Float[Tensor, "N D R"]

    def __post_init__(self) -> None:
        a, b = tuple(self.A.shape), tuple(self.B.shape)
        if len(a) != 3 or len(b) != 3 or a[0] != b[0] or a[1] != b[2]:
            raise ValueError(f"LoRAFactors needs A of shape (N, R, K) and B of shape (N, D, R), got A {a} and B {b}")

    def __len__(self) -> int:
        """Return the number of adapters, ``N``."""
        return self.A.shape[0]

    @property
    def rank(self) -> int:
        """Return the common rank ``R``; adapters of a lower rank are padded with zeros."""
        return self.A.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Return ``(D, K)``, the shape of one update."""
        return self.B.shape[1], self.A.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of ``B``."""
        return self.B.dtype

    @property
    def device(self) -> torch.device:
        """Return the device of ``B``."""
        return self.B.device

    def dense(self) -> Float[Tensor, "N D K"]:
        """Materialise the updates. Costs ``N*D*K`` entries: for tests and small layers."""
        return self.B @ self.A

    def padded(self, rank: int) -> LoRAFactors:
        """Return the same updates at a rank that is at least theirs: zeros are added to both factors."""
        if rank == self.rank:
            return self
        extra, pad = rank - self.rank, torch.nn.functional.pad
        return LoRAFactors(pad(self.A, (0, 0, 0, extra)), pad(self.B, (0, extra)))

    def to(self, target: torch.device | torch.dtype | str | None) -> LoRAFactors:
        """Move both factors to another device or dtype; None leaves them where they are."""
        return LoRAFactors(self.A.to(target), self.B.to(target))

    @classmethod
    def stack(cls, adapters: Sequence[LoRAFactors]) -> LoRAFactors:
        """Put several stacks on top of each other; lower ranks are padded with zeros, which changes no update.

        Args:
            adapters: at least one, all of the same ``(D, K)``.

        Raises:
            ValueError: if none is given or the layers differ in shape.
        """
        if not adapters:
            raise ValueError("LoRAFactors.stack needs at least one adapter, got none")
        shapes = sorted({f.shape for f in adapters})
        if len(shapes) > 1:
            raise ValueError(f"adapters of one layer must share one shape (D, K), got {shapes}")
        rank = max(f.rank for f in adapters)
        padded = [f.padded(rank) for f in adapters]
        return cls(torch.cat([f.A for f in padded]), torch.cat([f.B for f in padded]))
