"""Labels of what a run trains and compares, and the names of the files that it writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

#: In the folder of a run as long as there is something left to do: what ``--resume`` alone looks for.
UNFINISHED_NAME = "unfinished"
#: The JSON files of a run's folder, whose content :mod:`seedlora.records` has the types of.
SETTINGS_NAME, COST_NAME, RESULTS_NAME, SELECTION_NAME = "run.json", "cost.json", "results.json", "selection.json"
TRAINED_NAME, EXCLUDED_NAME, REPORT_NAME = "trained.json", "excluded.json", "report.json"
#: Who is at work in the folder: only there while somebody is.
OWNER_NAME = "owner.json"
#: In the folder of a trained control, and in that of a fused adapter.
CONTROL_NAME, FUSION_NAME = "control.json", "fusion.json"
#: The folder below a run's that holds the answers to tasks which are scored by generation.
EVALUATION_FOLDER = "evaluation"
BASE, MEAN_SEED, BEST_SEED, SOUP, FUSED = "base", "mean seed", "best seed", "soup", "fused"
#: The controls, under names that fit into a table.
GAIN_SEED: Final = "gain_seed"
GAIN_SOUP: Final = "gain_soup"
GREEDY: Final = "greedy_soup"
LOGITS, LONG_SEED, WIDE_SEED = "logit_mean", "long_seed", "wide_seed"
#: Those that are trained, in the order in which they are.
TRAINED_CONTROLS = (LONG_SEED, WIDE_SEED)
#: What each control is, in the order of tables.
MEANING = {
    LONG_SEED: "one seed, trained for the tokens of all",
    WIDE_SEED: "one seed, trained with the rank of all",
    GAIN_SEED: "the best seed of the validation rows times the gain of the fused adapter",
    GAIN_SOUP: "soup times the factor that is best on the validation rows",
    GREEDY: "soup of the seeds that do not harm on the validation rows",
    LOGITS: "the mean of the seeds' probabilities, no adapter",
}
#: Values of ``ensemble.merge`` beside the methods: method or gain are chosen on validation rows, or nothing is merged.
AUTO, AUTO_GAIN, NO_MERGE = "auto", "auto_gain", "none"
NO_CONTROLS, UNTRAINED, ALL_CONTROLS = "none", "untrained", "all"
#: The value of ``model.adapter`` that trains every weight instead of an adapter.
FULL = "full"


def seed_name(seed: int) -> str:
    """Return the label of a seed's adapter, which is the name of its folder too."""
    return f"seed_{seed}"


def nothing_for_one_seed(options: Mapping[str, object]) -> str | None:
    """Say which of the options given do nothing where there is one seed; ``None`` if none does.

    Args:
        options: of the command line, and whether each was given.
    """
    asked = [option for option, given in options.items() if given]
    does = "does" if len(asked) == 1 else "do"
    return f"With one seed {', '.join(asked)} {does} nothing: there is nothing to merge or compare." if asked else None
