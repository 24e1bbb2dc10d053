"""Write scores, losses and differences: one wording for terminal, report and model cards."""

from __future__ import annotations

from dataclasses import dataclass

from seedlora.scores.intervals import CONFIDENCE_PERCENT


@dataclass(frozen=True)
class NumberFormat:
    """Write numbers of one kind.

    Args:
        factor: that they are multiplied by.
        form: as :func:`format` takes it.
    """

    factor: int
    form: str

    def __call__(self, value: float) -> str:
        """Write a number."""
        return f"{self.factor * value:{self.form}}"

    def between(self, low: float, high: float) -> str:
        """Write an interval."""
        return f"{self(low)} to {self(high)}"

    def with_interval(self, value: float, low: float, high: float) -> str:
        """Write a number with its interval in brackets."""
        return f"{self(value)} ({self.between(low, high)})"


#: Shares, and differences between them.
PERCENT, POINTS = NumberFormat(100, ".1f"), NumberFormat(100, "+.1f")
#: Losses in nats per token, and differences between them.
LOSS, LOSS_CHANGE = NumberFormat(1, ".3f"), NumberFormat(1, "+.4f")


@dataclass(frozen=True)
class Comparative:
    """Name differences of one kind.

    Args:
        more: if it is above 0.
        less: if it is below.
    """

    more: str
    less: str

    def word(self, value: float) -> str:
        """Return what a difference that is shown is called."""
        return self.more if value > 0 else self.less


SCORES, LOSSES = Comparative("better", "worse"), Comparative("higher", "lower")


def judge(value: float, *, shown: bool, other: str | None = None, called: Comparative = SCORES) -> str:
    """Say what a difference shows: ``better than soup``, ``no difference from soup shown``.

    Args:
        value: of the first minus the second.
        shown: whether its interval leaves 0 out.
        other: the second; without it, it is not named.
        called: what the difference is called.
    """
    if not shown:
        return "no difference shown" if other is None else f"no difference from {other} shown"
    return called.word(value) if other is None else f"{called.word(value)} than {other}"


def interval_text(low: float, high: float, number: NumberFormat) -> str:
    """Write an interval with how sure it is: ``95 % interval +1.2 to +3.4``."""
    return f"{CONFIDENCE_PERCENT} % interval {number.between(low, high)}"


def difference_in_points(value: float, low: float, high: float) -> str:
    """Write a difference between shares in points, with its interval."""
    return f"{POINTS(value)} points ({interval_text(low, high, POINTS)})"
