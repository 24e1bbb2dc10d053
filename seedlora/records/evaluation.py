"""The files of an evaluation's folder: ``settings.json``, ``results.json`` and ``lm_eval.json``."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from seedlora.records.json_file import JSONFile
from seedlora.records.results import DifferenceRecord, ScoreRecord


class WeightSettings(TypedDict, total=False):
    """Tell what identifies weights.

    Attributes:
        weights_sha256: checksum of the adapter's weights; for a mean of probabilities the checksums of its members;
            null for the base model, or where a server alone has the weights.
    """

    weights_sha256: str | list[str] | None


class CandidateSettings(WeightSettings):
    """Tell what identifies an adapter that answers.

    Attributes:
        prompt: name of the prompt style, or the record of the prompt that the adapter was trained with.
    """

    prompt: str | dict[str, object]


class TaskSettings(TypedDict):
    """Tell what decides the answers to a task.

    Attributes:
        prefix: text that every answer begins with.
        stops: texts that end an answer.
        max_new_tokens: largest number of tokens of an answer.
    """

    prefix: str
    stops: list[str]
    max_new_tokens: int


class GeneratorSettings(TypedDict, total=False):
    """Tell who generates.

    Attributes:
        generator: `transformers`, in this process, or `endpoint`, a server.
        base_model: folder or hub id of the base model.
        dtype: dtype of the base model.
        quantization: how the base model is quantised.
        models: name of each adapter on the server.
    """

    generator: str
    base_model: str
    dtype: str
    quantization: str
    models: dict[str, str]


class EvaluationSettings(GeneratorSettings):
    """Tell what the answers in the folder were generated with; others are refused.

    Attributes:
        protocol: how answers are asked for and judged.
        adapters: who answers.
        tasks: what is asked.
    """

    protocol: str
    adapters: dict[str, CandidateSettings]
    tasks: dict[str, TaskSettings]


class TaskResults(TypedDict):
    """Describe the scores on one task. Where nothing was scored, only the answers are counted.

    Attributes:
        n: number of items.
        items_sha256: checksum of the items in their order.
        chance: share of items that guessing gets right; null where there is nothing to guess from.
        prefix: text that every answer begins with.
        stops: texts that end an answer.
        max_new_tokens: largest number of tokens of an answer.
        protocol_max_new_tokens: the same number as the protocol has it.
        scores: score of each adapter; null where generated code was not run.
        differences: what each adapter gains, by its label, then by the label of what it is compared with.
        metric: name of what is scored.
        mean_seed: mean score of the seeds; null without seeds.
        seed_spread: standard deviation of the seeds' scores, with n - 1; null for fewer than two seeds.
        best_seed: the seed with the highest score on these very items; null for fewer than two seeds.
        items: outcomes of each adapter: one digit for each item, 1 where it is right.
        quirks: for each adapter, how often which quirk of the extraction took part.
        unfinished: number of each adapter's answers that ended at `max_new_tokens`.
        tokens: number of tokens that each adapter generated.
        measures: how near the answers are to the right ones, as means from 0 to 1, by measure, then by adapter.
        loss: mean loss of a token of the right answers, by adapter, where a model in this process was scored.
        math_verify_scores: score of each adapter by math-verify, where that is installed and the answers are formulas.
        domains: for each kind of sub-domain the one that each item belongs to.
        groups: score in each sub-domain, by adapter.
    """

    n: int
    items_sha256: NotRequired[str]
    chance: NotRequired[float | None]
    prefix: str
    stops: list[str]
    max_new_tokens: int
    protocol_max_new_tokens: int
    scores: dict[str, ScoreRecord] | None
    differences: dict[str, dict[str, DifferenceRecord]]
    metric: NotRequired[str]
    mean_seed: NotRequired[float | None]
    seed_spread: NotRequired[float | None]
    best_seed: NotRequired[str | None]
    items: NotRequired[dict[str, str]]
    quirks: NotRequired[dict[str, dict[str, int]]]
    unfinished: NotRequired[dict[str, int]]
    tokens: NotRequired[dict[str, int]]
    measures: NotRequired[dict[str, dict[str, ScoreRecord]]]
    loss: NotRequired[dict[str, float]]
    math_verify_scores: NotRequired[dict[str, ScoreRecord]]
    domains: NotRequired[dict[str, list[str]]]
    groups: NotRequired[dict[str, dict[str, ScoreRecord]]]


class RatioRecord(TypedDict):
    """Describe a score relative to another on the same items.

    Attributes:
        value: the ratio.
        low: lower end of its 95 % bootstrap interval.
        high: upper end of that interval.
        undefined: number of resamples that have no ratio, since the other adapter has nothing right in them.
        resamples: number of resamples that were drawn.
    """

    value: float
    low: float
    high: float
    undefined: int
    resamples: int


class JointRecord(TypedDict):
    """Describe one adapter for several tasks: scores over all their items, and relative to each task's own adapter.

    Attributes:
        tasks: number of items of each task.
        own: for each task the adapter that was trained on it alone.
        union: score of each adapter over the items of all tasks.
        scores: share of right items of each adapter, by task.
        normalised: that share over the one of the task's own adapter; null where that is 0 or there is none.
        mean: for each adapter the mean of these ratios; null where there is none.
    """

    tasks: dict[str, int]
    own: dict[str, str]
    union: dict[str, ScoreRecord]
    scores: dict[str, dict[str, float]]
    normalised: dict[str, dict[str, float | None]]
    mean: dict[str, RatioRecord | None]


class JointView(TypedDict, total=False):
    """Describe several tasks together, where that was asked for.

    Attributes:
        joint: scores over several tasks together; only there where that was asked for.
    """

    joint: JointRecord


class EvaluationResults(GeneratorSettings, JointView):
    """Describe the scores of all tasks that were answered in the folder.

    Attributes:
        protocol: how answers are asked for and judged.
        prompt_styles: prompt style of each adapter, and where that is from.
        tasks: what was scored, by task.
    """

    protocol: str
    prompt_styles: dict[str, str]
    tasks: dict[str, TaskResults]


class MetricRecord(TypedDict):
    """Describe one metric of one task of the harness.

    Attributes:
        value: the metric's value.
        stderr: its standard error; null where the harness gives none.
    """

    value: float
    stderr: float | None


class HarnessResults(GeneratorSettings):
    """Describe the scores on tasks of lm-evaluation-harness.

    Attributes:
        protocol: `lm-eval`.
        limit: largest number of documents of a task; null is all.
        scores: values by adapter, then by task, then by metric.
    """

    protocol: str
    limit: int | None
    scores: dict[str, dict[str, dict[str, MetricRecord]]]


EVALUATION_SETTINGS = JSONFile("settings.json", EvaluationSettings, sort_keys=True, hides_home=True)
EVALUATION_RESULTS = JSONFile("results.json", EvaluationResults, hides_home=True)
HARNESS_RESULTS = JSONFile("lm_eval.json", HarnessResults, hides_home=True)
