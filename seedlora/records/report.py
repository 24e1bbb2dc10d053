"""``report.json``: all that the report of a run says, and the same of a comparison of several runs."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from seedlora.names import REPORT_NAME
from seedlora.records.cost import BaseIdentity, PlanRecord
from seedlora.records.front import Examples, Front
from seedlora.records.json_file import JSONFile
from seedlora.records.results import LossRecord, SampleLosses, ScoreRecord
from seedlora.records.selection import Selection
from seedlora.records.settings import RunSettings
from seedlora.records.sweep import SweepRecord
from seedlora.records.train_or_fuse import TrainOrFuseRecord
from seedlora.records.training import TrainedRow


class AdapterScore(ScoreRecord):
    """Describe the score of one adapter.

    Attributes:
        adapter: label of the adapter.
        right: number of items that it gets right.
    """

    adapter: str
    right: int


class PairedDifference(TypedDict):
    """Describe a mean difference over the same items.

    Attributes:
        value: mean over the items of the first's outcome minus the other's.
        low: lower end of its 95 % interval over items.
        high: upper end of that interval.
        n: number of items.
        p_value: p-value of the exact McNemar test; null where one side is the mean of several adapters.
        shown: whether the interval leaves 0 out.
        p_value_holm: the p-value adjusted by Holm's rule over the tasks, for the same two adapters.
        p_value_holm_table: the p-value adjusted by Holm's rule over all that are listed together.
    """

    value: float
    low: float
    high: float
    n: int
    p_value: float | None
    shown: bool
    p_value_holm: float | None
    p_value_holm_table: float | None


class AdapterComparison(PairedDifference):
    """Compare two adapters on one test set.

    Attributes:
        adapter: label of the adapter.
        against: label of what it is compared with.
    """

    adapter: str
    against: str


class RunComparison(PairedDifference):
    """Describe the fused adapters of two runs on the same items.

    Attributes:
        run: name of the run.
        against: name of the run that it is compared with.
    """

    run: str
    against: str


class RightSeeds(TypedDict):
    """Describe the items that a certain number of seeds get right.

    Attributes:
        right_seeds: a number of seeds.
        items: number of items that so many seeds get right.
        right: number of these items that each merged adapter gets right.
    """

    right_seeds: int
    items: int
    right: dict[str, int]


class DomainRow(TypedDict):
    """Describe one sub-domain of a test set.

    Attributes:
        domain: kind and value of the sub-domain.
        items: number of items that belong to it.
        scores: share of these items that each adapter gets right.
        winners: labels of all adapters that get most of them; none where nobody gets any.
        best_seed: label of the best seed here; null for fewer than two seeds.
        lead: score of the best seed minus that of the mean seed.
        lead_by_chance: mean lead when each item's outcomes are dealt to the seeds anew.
        p_value: share of such deals that lead as far.
    """

    domain: str
    items: int
    scores: dict[str, float]
    winners: list[str]
    best_seed: str | None
    lead: float | None
    lead_by_chance: float | None
    p_value: float | None


class TestSet(TypedDict):
    """Describe one test set: the run's own, or a task that is scored by generation.

    Attributes:
        name: `test set`, or the name of a task.
        metric: name of what is scored.
        items_sha256: checksum of the items in their order.
        chance: share of items that guessing gets right; null where there is nothing to guess from.
        n: number of items.
        scores: score of each adapter.
        mean_seed: mean score of the seeds; null without seeds.
        seed_spread: standard deviation of the seeds' scores, with n - 1; null for fewer than two seeds.
        best_seed: the seed with the highest score on these very items; null without seeds.
        comparisons: merged adapters against seeds and soup; the fused one against the controls too.
        by_right_seeds: how many items so many seeds get right.
        domains: scores in each sub-domain.
        tasks: number of test sets that p-values are adjusted over.
    """

    name: str
    metric: str | None
    items_sha256: str | None
    chance: float | None
    n: int
    scores: list[AdapterScore]
    mean_seed: float | None
    seed_spread: float | None
    best_seed: str | None
    comparisons: list[AdapterComparison]
    by_right_seeds: list[RightSeeds]
    domains: list[DomainRow]
    tasks: int


class CurveEnd(TypedDict):
    """Tell where a curve of validation losses ends.

    Attributes:
        step: the last optimizer step.
        last: loss after that step.
        lowest: lowest loss of the training.
    """

    step: int
    last: float
    lowest: float


class TrainingCurves(TypedDict):
    """Hold losses over the steps of the training, by adapter, in nats per token.

    Attributes:
        steps_per_point: number of steps that each point of a training curve is the mean of.
        ends: where each curve of validation losses ends.
        train: training losses of each adapter, as pairs of step and loss.
        validation: validation losses of each adapter, as pairs of step and loss.
    """

    steps_per_point: int
    ends: dict[str, CurveEnd]
    train: dict[str, list[list[float]]]
    validation: dict[str, list[list[float]]]


class Advice(TypedDict):
    """Tell which adapter to use: terminal, report, cards and printed commands follow it.

    Attributes:
        use: label of what to use; `base` where training is shown to have harmed; null where nothing was trained.
        folder: its folder in the run's; null for `base` and where nothing was trained.
        headline: whether training helped, which adapter to use, and how sure that is, a sentence each.
        sentences: what speaks against the fused adapter; none if nothing does.
        better: label of the adapter that is better than the fused one; null if none is.
    """

    use: NotRequired[str | None]
    folder: NotRequired[str | None]
    headline: NotRequired[list[str]]
    sentences: list[str]
    better: str | None


class ModuleRow(TypedDict):
    """Describe all layers of one type of module by their means.

    Attributes:
        module: last part of the layers' paths, such as `q_proj`.
        layers: number of layers of this type.
        mean_cosine: cosine of two seeds' updates.
        rho: norm of the mean update over the mean norm of the updates.
        gain: factor that SeedLoRA multiplies the mean update with.
        sign_agreement: share of entries on which two seeds have one sign.
        norm: Frobenius norm of a seed's update.
        effective_rank: effective rank of a seed's update.
        merged_norm: Frobenius norm of the fused update; null if nothing was merged.
        merged_effective_rank: effective rank of the fused update; null if nothing was merged.
        applied_gain: norm of the fused update over that of the mean update; null if nothing was merged.
    """

    module: str
    layers: int
    mean_cosine: float
    rho: float
    gain: float
    sign_agreement: float
    norm: float
    effective_rank: float
    merged_norm: float | None
    merged_effective_rank: float | None
    applied_gain: float | None


class LayerRow(TypedDict):
    """Describe one layer.

    Attributes:
        path: path of the layer in the model.
        module: last part of the path.
        layer: depth of the layer.
        mean_cosine: cosine of two seeds' updates, mean over the pairs.
        applied_gain: norm of the fused update over that of the mean update; null if nothing was merged.
        effective_rank: effective rank of a seed's update, mean over the seeds.
        merged_effective_rank: effective rank of the fused update; null if nothing was merged.
    """

    path: str
    module: str
    layer: int
    mean_cosine: float
    applied_gain: float | None
    effective_rank: float
    merged_effective_rank: float | None


class Spectra(TypedDict):
    """Hold singular values in one layer.

    Attributes:
        path: path of the layer.
        singular_values: singular values of each adapter's update, the largest first.
        effective_rank: effective rank of each adapter's update.
    """

    path: str
    singular_values: dict[str, list[float]]
    effective_rank: dict[str, float]


class Distributions(TypedDict):
    """Tell how the entries of the updates in some layers are distributed.

    Attributes:
        layers: paths of the layers.
        entries: number of entries of each adapter's updates.
        edges: edges of the bins.
        density: density of each adapter's entries in each bin.
        std: standard deviation of each adapter's entries.
    """

    layers: list[str]
    entries: int
    edges: list[float]
    density: dict[str, list[float]]
    std: dict[str, float]


class WeightRecord(TypedDict):
    """Tell what the weights of seeds and fused adapter look like.

    Attributes:
        seeds: labels of the seeds.
        cosines: cosines of all pairs of seeds, each taken as one vector.
        modules: means over the layers of each type of module.
        layers: the same of each layer.
        spectra: singular values in the layer in the middle.
        distributions: how the entries of the updates in the middle are distributed.
    """

    seeds: list[str]
    cosines: list[list[float]]
    modules: list[ModuleRow]
    layers: list[LayerRow]
    spectra: Spectra
    distributions: Distributions


class Share(TypedDict):
    """Tell what the ensemble takes, beside what one of its seeds takes alone.

    Attributes:
        what: what is counted.
        all: amount for all seeds.
        one: amount for one seed; null where that is not known.
    """

    what: str
    all: float
    one: float | None


class Reproduction(TypedDict):
    """Tell what it takes to make the run again.

    Attributes:
        command: command that starts the run; null if `train.py` cannot.
        versions: versions of Python and of the libraries.
        options: options of the merge method.
        sha256: checksum of each adapter's weights.
        base: what tells the base model from another.
        settings: settings of the run.
    """

    command: str | None
    versions: dict[str, str]
    options: dict[str, object]
    sha256: dict[str, str]
    base: BaseIdentity
    settings: RunSettings


class AdapterRow(TypedDict):
    """Tell what one adapter cost, and what it gives.

    Attributes:
        adapter: label of the adapter.
        tokens: tokens that went into it; null where that is not known.
        train_loss: mean over the last tenth of its training losses, at least one point; null without any.
        sample_loss: its loss on the training rows that all were scored on after the test; null without.
        value: its score on the first test set; null without.
        low: lower end of the score's interval.
        high: upper end of that interval.
    """

    adapter: str
    tokens: int | None
    train_loss: float | None
    sample_loss: LossRecord | None
    value: float | None
    low: float | None
    high: float | None


class ReportAdvice(TypedDict):
    """Hold what a report advises, whatever else is in it.

    Attributes:
        advice: which adapter to use.
    """

    advice: Advice


class Report(TypedDict):
    """Hold all that the report of a run says.

    Attributes:
        run: name of the run's folder.
        title: what was trained on what, and when.
        front: what the first screen says.
        examples: test items with the answers to them; null where these are not stored.
        method: the merge method; null where nothing is known of it.
        merged: label of what was made of the seeds: `fused`, or `soup` for plain soup; null if nothing was.
        seeds: labels of all seeds that were to be trained.
        trained: labels of the seeds that are trained.
        confidence_percent: how sure all intervals are.
        tests: the run's own test set, then the tasks scored by generation.
        training: losses over the training, in nats per token.
        train_sample: losses of all that was tested on the same training rows.
        selection: what the validation rows said.
        sweep: validation losses over the swept options; null if nothing is swept.
        train_or_fuse: whether one seed that is trained longer beats soup; null where that is no question.
        advice: which adapter to use.
        weights: what the adapters look like; null for whole models and unreadable folders.
        cost: the plan of the run.
        took: seconds, as `cost.json` has them.
        trained_on: how long each adapter was trained.
        shares: what the ensemble takes, beside what one seed takes.
        missing: what was never there, a sentence each.
        left_out: what was refused, dropped, stopped or chosen away, a sentence each.
        more: comparisons that the run does not hold, and the options that give them, a sentence each.
        reproduce: what it takes to make the run again.
        adapters: what each adapter cost, beside its score.
        verdict: the outcome in a sentence.
    """

    run: str
    title: str
    front: Front
    examples: Examples | None
    method: str | None
    merged: str | None
    seeds: list[str]
    trained: list[str]
    confidence_percent: int
    tests: list[TestSet]
    training: TrainingCurves
    train_sample: SampleLosses | None
    selection: Selection | None
    sweep: SweepRecord | None
    train_or_fuse: TrainOrFuseRecord | None
    advice: Advice
    weights: WeightRecord | None
    cost: PlanRecord | None
    took: dict[str, dict[str, float]]
    trained_on: dict[str, TrainedRow]
    shares: list[Share]
    missing: list[str]
    left_out: list[str]
    more: list[str]
    reproduce: Reproduction
    adapters: list[AdapterRow]
    verdict: str


class RunRow(TypedDict):
    """Hold one of several runs.

    Attributes:
        run: name of the run.
        settings: values of the settings that differ between the runs, by their names.
        method: its merge method.
        seeds: number of seeds that were trained.
        n: number of test items; null without a test.
        items_sha256: checksum of the test items.
        base: score of the base model.
        mean_seed: mean score of the seeds.
        seed_spread: standard deviation of the seeds' scores.
        soup: score of soup.
        fused: score of the fused adapter.
        against_mean_seed: fused adapter against mean seed.
        mean_cosine: cosine of two seeds' updates, mean over the pairs.
        use: label of what the run advises to use; null where nothing was trained.
        used: score of that.
        tokens: tokens that all seeds were trained on; null where that is not known.
        seconds: how long the whole run took; null where that is not known.
        verdict: verdict of the run's own report.
    """

    run: str
    settings: dict[str, str]
    method: str | None
    seeds: int
    n: int | None
    items_sha256: str | None
    base: AdapterScore | None
    mean_seed: float | None
    seed_spread: float | None
    soup: AdapterScore | None
    fused: AdapterScore | None
    against_mean_seed: AdapterComparison | None
    mean_cosine: float | None
    use: str | None
    used: AdapterScore | None
    tokens: float | None
    seconds: float | None
    verdict: str


class ComparisonReport(TypedDict):
    """Put several runs side by side.

    Attributes:
        title: of the page.
        differing: names of the settings that differ.
        best: what the runs advise to use, in the order of their scores; null where the test items are not the same.
        runs: what is known of each run.
        verdict: the comparisons in words.
        paired: fused adapters of two runs on the same items.
        confidence_percent: how sure all intervals are.
        missing: what is not there, a sentence each.
    """

    title: str
    differing: list[str]
    best: str | None
    runs: list[RunRow]
    verdict: str
    paired: list[RunComparison]
    confidence_percent: int
    missing: list[str]


REPORT = JSONFile(REPORT_NAME, Report, allow_nan=False, hides_home=True)
#: The same file, for whoever asks it for the advice alone.
REPORT_ADVICE = JSONFile(REPORT_NAME, ReportAdvice, allow_nan=False)
COMPARISON_REPORT = JSONFile(REPORT_NAME, ComparisonReport, allow_nan=False, hides_home=True)
