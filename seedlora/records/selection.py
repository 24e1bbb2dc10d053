"""``selection.json``: what the validation rows said when the seeds were merged."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from seedlora.names import SELECTION_NAME
from seedlora.records.json_file import JSONFile


class ValidationScore(TypedDict):
    """Tell what the validation rows say of one adapter.

    Attributes:
        loss: the loss in nats per token.
        match: share of rows that greedy decoding answers exactly.
    """

    loss: float
    match: float


class RuleRecord(TypedDict):
    """Describe a merge rule.

    Attributes:
        method: its name in the table of methods.
        options: its options, as far as they are not the default ones.
    """

    method: str
    options: dict[str, object]


class NamedRule(TypedDict):
    """Describe a merge rule that was tried.

    Attributes:
        name: what tables call this rule.
        method: name of the merge method.
        options: options of the method, as far as they are not the default ones.
    """

    name: str
    method: str
    options: dict[str, object]


class CandidateRecord(NamedRule):
    """Describe a rule that was tried, and what the validation rows say of the adapter that it makes.

    Attributes:
        loss: validation loss of what the rule makes, in nats per token.
        match: share of rows that this adapter answers exactly.
    """

    loss: float
    match: float


class LossDifference(TypedDict):
    """Describe a difference between the losses of two adapters on the validation rows.

    Attributes:
        value: the first one's loss minus the other's, in nats per token.
        low: lower end of its 95 % interval over rows.
        high: upper end of that interval.
        n: number of rows.
        shown: whether the interval leaves 0 out.
    """

    value: float
    low: float
    high: float
    n: int
    shown: bool


class ChoiceRecord(TypedDict):
    """Tell what was chosen on the validation rows, and how sure that is.

    Attributes:
        what: what it was chosen as, in words.
        chosen: name of the best.
        next: name of the next best that differs.
        difference: what decides (`by`) of the best minus that of the next: losses, or shares of rows.
        sentence: the same for people, and whether it is within the noise of these rows.
    """

    what: str
    chosen: str
    next: str
    difference: LossDifference
    sentence: str


class GainSeed(TypedDict):
    """Describe the control `gain_seed`.

    Attributes:
        seed: label of the seed that it is made of, the best on these rows.
    """

    seed: str


class GainSoup(NamedRule):
    """Describe the control `gain_soup`: the multiple of soup that is best on these rows.

    Attributes:
        candidates: all multiples of soup that were tried.
    """

    candidates: list[CandidateRecord]


class GreedySoup(TypedDict):
    """Describe the control `greedy_soup`.

    Attributes:
        members: places of its seeds in the list of trained seeds, the best first.
    """

    members: list[int]


class Controls(TypedDict, total=False):
    """Describe the controls that were tuned on the validation rows.

    Attributes:
        gain_seed: one seed times the gain of the fused adapter.
        greedy_soup: soup of the seeds that do not harm.
        gain_soup: soup times a factor.
    """

    gain_seed: GainSeed
    greedy_soup: GreedySoup
    gain_soup: GainSoup


class SubsetRecord(TypedDict):
    """Describe some of the seeds, fused.

    Attributes:
        seeds: labels of the seeds.
        loss: validation losses of `soup` and of the run's rule (`fused`), in nats per token.
    """

    seeds: list[str]
    loss: dict[str, float]


class Selection(TypedDict):
    """Tell what the validation rows decided, and what they say of the outcome.

    Attributes:
        by: what is best: the lowest `loss`, or most exact matches (`match`).
        not_finite: names of all that was scored and has no finite loss, which is never chosen.
        rows: number of validation rows.
        tokens: number of tokens in them that the loss is taken of.
        asked: the merge method that was asked for.
        chosen: the rule that was chosen; null where none was to be chosen.
        candidates: the rules that it was chosen from, in the order in which they were tried.
        best_seed: label of the best seed.
        scores: what the rows say of each adapter.
        against: what the fused adapter's loss is above that of the best seed and of `soup`.
        soup_gain: what the mean seed's loss is above that of soup; null for one seed.
        choices: what was chosen on these rows, each with the next best.
        controls: the controls that were tuned on these rows.
        subsets: losses by the seeds that are merged; only filled where controls were asked for.
    """

    by: str
    not_finite: NotRequired[list[str]]
    rows: int
    tokens: int
    asked: str
    chosen: NamedRule | None
    candidates: list[CandidateRecord]
    best_seed: str
    scores: dict[str, ValidationScore]
    against: dict[str, LossDifference]
    soup_gain: NotRequired[LossDifference | None]
    choices: NotRequired[list[ChoiceRecord]]
    controls: Controls
    subsets: list[SubsetRecord]


SELECTION = JSONFile(SELECTION_NAME, Selection)
