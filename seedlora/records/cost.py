"""``cost.json``: what a run was going to do, by which libraries, and what it took."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from seedlora.names import COST_NAME
from seedlora.records.json_file import JSONFile


class BudgetRecord(TypedDict):
    """Tell how long each seed trains: whichever of the two ends first.

    Attributes:
        epochs: at most so many epochs; null is no limit.
        steps: at most so many optimizer steps; null is no limit.
    """

    epochs: int | None
    steps: int | None


class MemoryRecord(TypedDict):
    """Describe an estimate of the memory that training takes in one process, in bytes.

    Attributes:
        base: bytes of the frozen base model.
        adapters: bytes of the adapters' weights and gradients.
        optimizer: bytes of the optimizer's state.
        activations: bytes that are kept for the backward pass.
    """

    base: int
    adapters: int
    optimizer: int
    activations: int


class PlanRecord(TypedDict):
    """Describe the plan of a run as it was shown before training.

    Attributes:
        seeds: the seeds of the ensemble.
        replicas: options of its own of each replica, by its name; there is one per seed unless options are swept.
        passes: number of stacks that they are trained in, one after the other.
        budget: `equal` divides the run's steps among the seeds, `full` gives each seed all of them.
        replica: how long each seed trains.
        steps: optimizer steps of each seed that trains to the end.
        replica_steps: optimizer steps of all replicas together, one with k times the rows as k.
        batch: rows of each seed in an optimizer step.
        rows: number of training rows.
        tokens: tokens that each seed sees in training.
        supervised: of these tokens, the ones that the loss is taken of.
        padding: share of a forward's tokens that is padding.
        trainable: number of parameters that are trained in one seed, the mean where they differ.
        base_parameters: number of parameters of the frozen base model.
        memory: estimate for one stack in one process.
        memory_alone: estimate for one seed alone.
        model: folder or hub id of the base model.
        data: name of the data module, with the number of its rows.
        merge: the merge method.
        dtype: dtype of the base weights.
        adapter: what is trained, in words.
        compile: backend that compiles the layers; null is none.
        controls: the controls that are trained too, in words; null is none.
        scheme: how the replicas share the budget, in words; null where each is trained for itself.
        means: which means of the weights are written beside the replicas, in words; null where none are.
        processes: number of processes that train.
        left_out: a sentence for each source of rows that are not all used as they are.
        note: what was asked for and does nothing, in words; null is nothing.
        memory_note: how far the estimates can be off, where that is far; null elsewhere.
        packing: how rows share a forward and why, in words; null where the data does not say.
    """

    seeds: list[int]
    replicas: NotRequired[dict[str, dict[str, float | str]]]
    passes: int
    budget: str
    replica: BudgetRecord
    steps: int
    replica_steps: NotRequired[int]
    batch: int
    rows: int
    tokens: int
    supervised: int
    padding: float
    trainable: int
    base_parameters: int
    memory: MemoryRecord
    memory_alone: NotRequired[MemoryRecord]
    model: str
    data: str
    merge: str
    dtype: str
    adapter: str
    compile: str | None
    controls: str | None
    scheme: NotRequired[str | None]
    means: NotRequired[str | None]
    processes: int
    left_out: NotRequired[list[str]]
    note: str | None
    memory_note: NotRequired[str | None]
    packing: NotRequired[str | None]


def replica_count(plan: PlanRecord) -> int:
    """Return how many replicas a run trains: as many as seeds in files without a word about them."""
    return len(plan["replicas"] if "replicas" in plan else plan["seeds"])


class BaseIdentity(TypedDict, total=False):
    """Identify the base model: by its commit on the hub, or by the files of its folder.

    Attributes:
        revision: the commit on the hub.
        config_sha256: checksum of `config.json`.
        bytes: size of each weight file.
    """

    revision: str | None
    config_sha256: str
    bytes: dict[str, int]


class CostRecord(TypedDict):
    """Tell what a run was going to do, by which libraries, and what it took.

    Attributes:
        started: when the run was started first, with the time zone.
        plan: what was to be trained.
        versions: versions of Python and of the libraries.
        base: what tells the base model from another.
        took: seconds by what was trained (`seeds`, `long_seed`, `wide_seed`), then by phase: `starting`, `training`,
            `validation`, `fusing`.
        peak_bytes: most memory that was held while seeds were trained, beside what was held before.
    """

    started: NotRequired[str]
    plan: PlanRecord
    versions: dict[str, str]
    base: BaseIdentity
    took: dict[str, dict[str, float]]
    peak_bytes: int


COST = JSONFile(COST_NAME, CostRecord, hides_home=True)
