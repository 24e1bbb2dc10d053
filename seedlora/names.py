"""Labels of what a run trains and compares, and the names of the files that it writes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

#: In the folder of a run as long as there is something left to do: what ``--resume`` alone looks for.
UNFINISHED_NAME = "unfinished"
#: What ``Trainer.predict`` writes.
PREDICTIONS_NAME = "predictions.jsonl"
#: What each adapter takes for the answer of each test row.
SAMPLES_NAME = "samples.jsonl"
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
WIDE_BATCH, OUTER_SEED = "wide_batch", "outer_seed"
#: Trained for the tokens of all replicas, one after the other.
LONG: Final = (LONG_SEED, OUTER_SEED)
#: Of the training of ``long_seed``: the weights of its best validation, and their exponential mean.
LONG_SEED_BEST, LONG_SEED_EMA = "long_seed_best", "long_seed_ema"
#: Of the wide batch, one training for each learning rate that is tried: it is multiplied by the number of seeds to this
#: power. The one with the lowest validation loss is ``wide_batch``.
WIDE_BATCHES: Final = {f"{WIDE_BATCH}_x1": 0.0, f"{WIDE_BATCH}_xroot": 0.5, f"{WIDE_BATCH}_xn": 1.0}
#: Those that are trained, in the order in which they are.
TRAINED_CONTROLS: Final = (*LONG, WIDE_SEED, *WIDE_BATCHES)
#: The soup of the exponential means of all replicas.
EMA_SOUP: Final = "ema_soup"
#: What each control is, in the order of tables.
MEANING = {
    LONG_SEED: "one seed, trained for the tokens of all",
    LONG_SEED_BEST: "the same at the step of its lowest validation loss: early stopping",
    LONG_SEED_EMA: "the same as an exponential mean of its weights",
    WIDE_SEED: "one seed, trained with the rank of all",
    WIDE_BATCH: "one seed with the rows of all in each step, at the rate that is best on the validation rows",
    OUTER_SEED: "one seed for the tokens of all, with an outer Nesterov step",
    EMA_SOUP: "soup of the exponential means of the seeds' weights",
    GAIN_SEED: "the best seed of the validation rows times the gain of the fused adapter",
    GAIN_SOUP: "soup times the factor that is best on the validation rows",
    GREEDY: "soup of the seeds that do not harm on the validation rows",
    LOGITS: "the mean of the seeds' probabilities, no adapter",
}
#: Values of ``ensemble.merge`` beside the methods: method or gain are chosen on validation rows, or nothing is merged.
AUTO, AUTO_GAIN, NO_MERGE = "auto", "auto_gain", "none"
NO_CONTROLS, UNTRAINED, ALL_CONTROLS, EQUAL_TOKENS = "none", "untrained", "all", "equal_tokens"
#: The key of a config.yaml that ``train.py`` cannot start from: it says why.
FROM_PYTHON = "only_from_python"
#: The value of ``model.adapter`` that trains every weight instead of an adapter.
FULL = "full"
SCHEDULES = ("cosine", "linear", "constant")
#: The options that replicas may differ in, by what stands before their values in a replica's name.
SWEPT: Final = {
    "learning_rate": "lr",
    "r": "r",
    "lora_alpha": "alpha",
    "lora_plus_ratio": "plus",
    "weight_decay": "decay",
    "lr_scheduler": "",
    "warmup_ratio": "warmup",
}
_NUMBER_TAGS = "|".join(filter(None, SWEPT.values()))
_REPLICA = re.compile(rf"seed_(\d+)(?:_(?:(?:{_NUMBER_TAGS})\d[\dpem]*|{'|'.join(SCHEDULES)}))*")


def seed_name(seed: int) -> str:
    """Return the label of a seed's adapter, which is the name of its folder too."""
    return f"seed_{seed}"


def replica_name(seed: int, options: Mapping[str, float | str]) -> str:
    """Return the label of a replica that differs from others in more than its seed.

    It is the name of a PEFT adapter, which has no dots, and of a folder; folders of checkpoints join such names by
    hyphens. So a point is written ``p``, a minus ``m``.

    >>> replica_name(11, {"learning_rate": 0.001, "r": 16, "lr_scheduler": "linear"}), replica_name(11, {})
    ('seed_11_lr0p001_r16_linear', 'seed_11')
    >>> replica_name(11, {"learning_rate": 2e-05})
    'seed_11_lr2em05'
    """
    tags = [SWEPT[option] + _name_value(value) for option, value in options.items()]
    return "_".join([seed_name(seed), *tags])


def _name_value(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return repr(value).removesuffix(".0").replace(".", "p").replace("-", "m").replace("+", "")


def is_replica(label: str) -> bool:
    """Return whether a label is that of a seed's adapter, and not of what was made of it.

    >>> is_replica("seed_11"), is_replica("seed_11_lr0p001"), is_replica("seed_11_ema"), is_replica("long_seed")
    (True, True, False, False)
    """
    return _REPLICA.fullmatch(label) is not None


def seed_of(label: str) -> int:
    """Return the seed of a replica's label.

    >>> seed_of("seed_11_lr0p001")
    11
    """
    match = _REPLICA.fullmatch(label)
    if match is None:
        raise ValueError(f"{label} is no label of a replica, such as seed_11 or seed_11_lr0p001")
    return int(match[1])


def ema_name(label: str) -> str:
    """Return the label of the exponential mean of an adapter's weights."""
    return f"{label}_ema"


def nothing_for_one_seed(options: Mapping[str, object]) -> str | None:
    """Say which of the options given do nothing where there is one seed; ``None`` if none does.

    Args:
        options: of the command line, and whether each was given.
    """
    asked = [option for option, given in options.items() if given]
    does = "does" if len(asked) == 1 else "do"
    return f"With one seed {', '.join(asked)} {does} nothing: there is nothing to merge or compare." if asked else None
