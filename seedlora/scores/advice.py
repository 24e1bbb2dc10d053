"""Whether the fused adapter is the one to use: what validation rows and test items say, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from seedlora.names import FUSED, SOUP
from seedlora.scores.intervals import paired_difference


def advice(
    selection: Mapping[str, Any], items: Mapping[str, np.ndarray], seeds: Sequence[str], *, method: str | None
) -> dict[str, Any]:
    """Compare the fused adapter with soup, and with the seed that validation found best.

    A seed picked by the test items would be flattered by them, so without validation no seed is judged.

    Args:
        selection: what the validation rows said; empty without.
        items: by label, whether each test item was right; empty without a test.
        seeds: labels that are single seeds.
        method: that fused.

    Returns:
        ``sentences``, and the label of the adapter that is ``better`` than the fused one: shown so by one of loss and
        test, and not the opposite by the other; of two, the one with the lower validation loss. ``None`` if there is
        none.
    """
    label = FUSED if FUSED in items or not items else SOUP
    best = selection.get("best_seed")
    scores = selection.get("scores", {})
    said: list[str] = []
    better: list[str] = []
    for other in (SOUP, best):
        if other is None or other == label or (other in seeds and len(seeds) == 1):
            continue
        name = "soup" if other == SOUP else f"{other}, the best seed of the validation rows"
        found, votes = [], []
        if (row := selection.get("against", {}).get(other)) is not None and row["shown"]:
            votes.append(row["value"] < 0)
            found.append(
                f"its validation loss is {scores[FUSED]['loss']:.3f} against {scores[other]['loss']:.3f} "
                f"({row['value']:+.3f}, {row['low']:+.3f} to {row['high']:+.3f}, n = {row['n']})"
            )
        if label in items and other in items and (row := paired_difference(items[label], items[other])).shown:
            votes.append(row.value > 0)
            found.append(
                f"it gets {abs(100 * row.value):.1f} points {'more' if row.value > 0 else 'less'} of the test items "
                f"({100 * row.low:+.1f} to {100 * row.high:+.1f}, n = {row.n})"
            )
        if not votes or all(votes):
            continue
        if any(votes):
            said.append(f"Against {name}, {' but '.join(found)}: choose by what you need.")
        else:
            better.append(other)
            said.append(f"The fused adapter ({method}) is worse than {name}: {' and '.join(found)}.")
    winner = min(better, key=lambda other: scores.get(other, {}).get("loss", np.inf), default=None)
    return {"sentences": said, "better": winner}
