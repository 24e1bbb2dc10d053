"""Which adapter is the better one, and what is said of the fused one."""

from __future__ import annotations

import numpy as np

from seedlora.scores.advice import advice
from seedlora.scores.results import Results, results


def results_with(**right: int) -> Results:
    """A test of which adapters get the first so many of 100 items right."""
    outcomes = np.stack([np.arange(100) < count for count in right.values()], axis=1)
    return results(outcomes, list(right), ["seed_1"] if "seed_1" in right else [], metric="it")


def difference(value: float, shown: bool = True) -> dict[str, object]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01, "n": 64, "shown": shown}


def test_advice_names_the_better_adapter_and_where_the_measures_disagree():
    losses = {"fused": 1.064, "soup": 0.972, "seed_1": 0.973, "seed_2": 0.995}
    selection = {
        "best_seed": "seed_1",
        "scores": {label: {"loss": loss, "match": 0.0} for label, loss in losses.items()},
        "against": {"soup": difference(0.092), "seed_1": difference(0.091)},
    }
    judged = lambda test, chosen=selection: advice(chosen, test, ["seed_1", "seed_2"], method="seedlora")  # noqa: E731
    found = judged(results_with(fused=40, soup=60, seed_1=42))
    assert found["better"] == "soup"
    assert found["sentences"][0].startswith(
        "The fused adapter (seedlora) is worse than soup: its validation loss is 1.064 against 0.972 "
        "(+0.092, +0.082 to +0.102, n = 64) and it gets 20.0 points less of the test items (-29.1 to -12.0, n = 100)."
    )
    assert "worse than seed_1, the best seed of the validation rows: its validation loss" in found["sentences"][1]
    found = judged(results_with(fused=60, soup=40, seed_1=40))
    assert found["better"] is None
    assert "Against soup, its validation loss is 1.064" in found["sentences"][0]
    assert "but it gets 20.0 points more of the test items" in found["sentences"][0]
    better = {**selection, "against": {"soup": difference(-0.1), "seed_1": difference(0.1, shown=False)}}
    assert judged(None, better) == {"sentences": [], "better": None}
    assert judged(results_with(fused=10, soup=60), None)["better"] == "soup"
    assert judged(None, None) == {"sentences": [], "better": None}
