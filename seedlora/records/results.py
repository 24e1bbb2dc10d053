"""``results.json``: what the test said."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from seedlora.names import RESULTS_NAME
from seedlora.records.json_file import JSONFile


class ScoreRecord(TypedDict):
    """Describe a share of right items.

    Attributes:
        value: the share of right items.
        low: lower end of its 95 % Wilson interval.
        high: upper end of that interval.
        n: number of items.
    """

    value: float
    low: float
    high: float
    n: int


class DifferenceRecord(TypedDict):
    """Describe a mean difference between two adapters, paired by item.

    Attributes:
        value: mean over the items of the first adapter's outcome (1 right, 0 wrong) minus the other's.
        low: lower end of its 95 % interval over items.
        high: upper end of that interval.
        n: number of items.
        p_value: p-value of the exact McNemar test; null where one side is the mean of several adapters.
        p_value_holm: that p-value adjusted by Holm's rule over all tasks that were scored; only there if there is a
            p-value.
    """

    value: float
    low: float
    high: float
    n: int
    p_value: float | None
    p_value_holm: NotRequired[float]


class LossRecord(TypedDict):
    """Describe a loss per token.

    Attributes:
        value: the loss in nats per token.
        low: lower end of its 95 % interval over rows.
        high: upper end of that interval.
    """

    value: float
    low: float
    high: float


class SampleLosses(TypedDict):
    """Hold the losses of all that was tested on the same training rows.

    Attributes:
        rows: number of training rows.
        tokens: number of tokens in them that the loss is taken of.
        losses: loss of each adapter; one that is not finite is left out.
    """

    rows: int
    tokens: int
    losses: dict[str, LossRecord]


class RunResults(TypedDict):
    """Tell what the test of a run said.

    Attributes:
        metric: name of what is scored.
        scores: score of each adapter.
        mean_seed: mean score of the seeds; null without seeds.
        seed_spread: standard deviation of the seeds' scores, with n - 1; null for fewer than two seeds.
        best_seed: the seed with the highest score on these very items, which flatters it; null for fewer than two
            seeds.
        differences: what each adapter gains, by its label, then by the label of what it is compared with: `mean seed`,
            `best seed`, `soup`.
        items: outcomes of each adapter: one digit for each item, 1 where it is right.
        domains: for each property of the data, such as `num_terms`, the value that each item has.
        items_sha256: checksum of the test rows in their order; runs with the same one were tested on the same items.
        train_sample: losses on some training rows, the same rows for all that was tested.
        left_out: why a replica was not tested, by its label: it diverged, or a halving dropped it; only there
            if one was.
    """

    metric: str
    scores: dict[str, ScoreRecord]
    mean_seed: float | None
    seed_spread: float | None
    best_seed: str | None
    differences: dict[str, dict[str, DifferenceRecord]]
    items: NotRequired[dict[str, str]]
    domains: NotRequired[dict[str, list[str]]]
    items_sha256: NotRequired[str]
    train_sample: NotRequired[SampleLosses]
    left_out: NotRequired[dict[str, str]]


RESULTS = JSONFile(RESULTS_NAME, RunResults)
