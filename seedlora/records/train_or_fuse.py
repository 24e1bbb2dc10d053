"""In ``report.json``: whether training longer or fusing spends a budget better."""

from __future__ import annotations

from typing import TypedDict

from seedlora.records.results import LossRecord


class TrainOrFuseRecord(TypedDict):
    """Tell whether soup of the seeds beats one seed that is trained for the tokens of all.

    Attributes:
        verdict: `fuse`, `train longer`, or `unknown` where the interval of the margin holds 0 or there is none.
        seeds: number of seeds, n.
        slope: what a seed's validation loss falls by per e-fold of the steps, s; null where that cannot be told.
        gain: validation loss of the mean seed minus that of soup, g; null where that was not measured.
        margin: g - s ln n, in nats per token; null without both.
        loss_ratio: training loss of the seeds at the end over their validation loss; null where one is not known.
        long_seed: validation loss of the one seed that was trained for the tokens of all minus that of soup; null where
            it was not trained.
        sentences: what is known, and what to do next.
    """

    verdict: str
    seeds: int
    slope: LossRecord | None
    gain: LossRecord | None
    margin: LossRecord | None
    loss_ratio: float | None
    long_seed: float | None
    sentences: list[str]
