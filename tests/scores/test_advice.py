"""Which adapter is the better one, and what is said of the fused one."""

from __future__ import annotations

import numpy as np

from seedlora.scores.advice import advise, compare_fused
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
    judged = lambda test, chosen=selection: compare_fused(chosen, test, ["seed_1", "seed_2"], method="seedlora")  # noqa: E731
    found = judged(results_with(fused=40, soup=60, seed_1=42))
    assert found["better"] == "soup"
    assert found["sentences"][0].startswith(
        "The fused adapter (seedlora) is worse than soup: its validation loss is 1.064 against 0.972 "
        "(+0.092, +0.082 to +0.102, n = 64) and it gets 20.0 points less of the test items (-29.3 to -11.8, n = 100)."
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


def advised(test, *, merged="fused", seeds=("seed_1", "seed_2")):
    return advise(None, test, seeds, method="seedlora", merged=merged)


def test_the_first_sentence_says_whether_training_helped_and_the_second_which_folder():
    found = advised(results_with(base=10, seed_1=40, soup=48, fused=50))
    assert (found["use"], found["folder"], found["better"]) == ("fused", "fused", None)
    first, second = found["headline"]
    assert first.startswith("Training helped: 10.0 of the base model, 50.0 of fused; +40.0 points (95 % interval +30.")
    assert first.endswith(", n = 100.")
    assert second == "Use fused: no other adapter of the run is shown to be better."
    found = advised(results_with(base=10, seed_1=40, soup=60, fused=20))
    assert (found["use"], found["folder"]) == ("soup", "soup")
    assert found["headline"][0].startswith("Training helped: 10.0 of the base model, 60.0 of soup")
    assert found["headline"][1] == "Use soup: it is shown to be better than the fused adapter."
    found = advised(results_with(base=60, seed_1=40, soup=38, fused=40))
    assert (found["use"], found["folder"]) == ("base", None)
    assert found["headline"][0].startswith("Training harmed: 60.0 of the base model, 40.0 of fused; -20.0 points")
    assert found["headline"][1] == "Use the base model."
    none = advised(results_with(base=40, seed_1=40, soup=41, fused=42))
    assert none["headline"][0].startswith(
        "It is not shown that training helped: 40.0 of the base model, 42.0 of fused; +2.0 points"
    )


def test_a_test_that_says_nothing_is_said_to():
    zero = advised(results_with(base=0, seed_1=0, soup=0, fused=0))
    assert zero["headline"][0].startswith("Nobody got anything right: 0 of 100 items")
    few = results(np.array([[0, 0, 1, 0]] * 4, dtype=bool), ["base", "seed_1", "soup", "fused"], ["seed_1"], metric="")
    found = advised(few)
    assert (found["use"], found["better"]) == ("fused", None)
    assert found["headline"] == [
        "4 test items are too few to say whether training helped: 0.0 of the base model, 0.0 of fused.",
        "Use fused: no other adapter of the run is shown to be better; 4 items are too few to say more.",
    ]
    assert advised(None)["headline"][0] == "There was no test, so it is not known whether training helped."


def test_without_a_merged_adapter_a_seed_is_advised_and_plain_soup_is_in_the_folder_of_what_is_merged():
    found = advised(results_with(base=10, seed_1=40, seed_2=45), merged=None)
    assert (found["use"], found["folder"]) == ("seed_2", "seed_2")
    assert "gets most of these items, which flatters it" in found["headline"][1]
    found = advised(results_with(base=10, seed_1=40, soup=45), merged="soup")
    assert (found["use"], found["folder"]) == ("soup", "fused")
    assert advised(None, merged=None, seeds=())["use"] is None
