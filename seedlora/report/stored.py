"""Read what a run's folder holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seedlora.adapters.adapter import is_trained
from seedlora.names import FROM_PYTHON, FUSED, NO_CONTROLS, SOUP, is_replica
from seedlora.records.cost import COST, CostRecord
from seedlora.records.fusion import FUSION, FusionRecord
from seedlora.records.results import RESULTS, RunResults
from seedlora.records.selection import SELECTION, Selection
from seedlora.records.settings import SETTINGS, RunSettings
from seedlora.records.training import EXCLUDED, TRAINED, TrainedRow
from seedlora.run.sweep import planned_replicas
from seedlora.training.replicas import Replica
from seedlora.updates.diagnostics import natural_sort_key
from seedlora.utils.plain_data import from_yaml


@dataclass(frozen=True)
class GivenOptions:
    """Hold the options of the ensemble that a run was started with, as ``config.yaml`` has them.

    Args:
        known: whether there is such a file; without it, all below is as it is by default.
        only_from_python: why ``train.py`` cannot start the run from that file, if it cannot.
        replicas: names of what was to be trained.
        merge: the merge method.
        merge_options: its options.
        dirpath: the folder of the run, where it was started.
        compare: the methods that are compared, if any.
        controls: which controls were asked for.
    """

    known: bool
    only_from_python: str | None
    replicas: Sequence[str]
    merge: str | None
    merge_options: Mapping[str, object] | None
    dirpath: str | None
    compare: object
    controls: str


@dataclass(frozen=True)
class StoredRun:
    """Hold all that a run has stored besides its curves, weights and answers, finished or not.

    Args:
        folder: of the run.
        settings: what ``run.json`` says.
        options: what ``config.yaml`` says.
        seeds: labels of all seeds that were to be trained.
        trained: labels of those that are.
        excluded: by label why an adapter was left out.
        trained_on: by label how long an adapter was trained.
        merge: how the fused adapter was made; ``None`` if nothing was merged.
        selection: what the validation rows said.
        results: what the test said.
        cost: the plan, and what it took.
    """

    folder: Path
    settings: RunSettings
    options: GivenOptions
    seeds: Sequence[str]
    trained: Sequence[str]
    excluded: Mapping[str, str]
    trained_on: Mapping[str, TrainedRow]
    fusion: FusionRecord | None
    selection: Selection | None
    results: RunResults | None
    cost: CostRecord | None

    @property
    def name(self) -> str:
        """Return the name of the folder."""
        return self.folder.resolve().name

    @property
    def started_as(self) -> Path:
        """Return the folder as the run was started, which need not be where it is read from."""
        started = Path(str(self.options.dirpath or self.name))
        return started if started.name == self.name else Path(self.name)

    @property
    def method(self) -> str | None:
        """Return the merge method: the one that fused, or else the one that was asked for."""
        return (self.fusion["method"] if self.fusion is not None else None) or self.options.merge

    @property
    def merged_label(self) -> str:
        """Return the label of what is made of the seeds: plain soup is not scored again as the fused adapter."""
        return SOUP if self.method == SOUP and not self.options.merge_options else FUSED

    @property
    def merged(self) -> str | None:
        """Return the label of what was made of the seeds, if anything was."""
        return None if self.fusion is None else self.merged_label

    @property
    def pending(self) -> list[str]:
        """Return the seeds that are still to be trained."""
        return [seed for seed in self.seeds if seed not in self.trained and seed not in self.excluded]


def read_run(folder: Path) -> StoredRun:
    """Read a run's folder.

    Raises:
        ValueError: if it holds no run, or a file in it cannot be read.
    """
    settings = SETTINGS.read(folder)
    if settings is None:
        raise ValueError(f"{folder} holds no run: it has no {SETTINGS.name}")
    options, excluded = _read_options(folder), EXCLUDED.read(folder) or {}
    seeds = list(options.replicas) or _seed_folders(folder, excluded)
    return StoredRun(
        folder=folder,
        settings=settings,
        options=options,
        seeds=seeds,
        trained=[seed for seed in seeds if is_trained(folder / seed)],
        excluded=excluded,
        trained_on=TRAINED.read(folder) or {},
        fusion=FUSION.read(folder / FUSED),
        selection=SELECTION.read(folder),
        results=RESULTS.read(folder),
        cost=COST.read(folder),
    )


def _read_options(folder: Path) -> GivenOptions:
    """Read the options that a run was started with."""
    file = folder / "config.yaml"
    try:
        config = (from_yaml(file.read_text(encoding="utf-8")) or {}) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    ensemble = config.get("ensemble", {}) if isinstance(config, dict) else None
    if not isinstance(ensemble, dict):
        raise ValueError(f"{file} cannot be read: it holds no options of a run")
    return GivenOptions(
        known=bool(config),
        only_from_python=config.get(FROM_PYTHON),
        replicas=[replica.name for replica in _planned(ensemble)],
        merge=ensemble.get("merge"),
        merge_options=ensemble.get("merge_options"),
        dirpath=ensemble.get("dirpath"),
        compare=ensemble.get("compare"),
        controls=ensemble.get("controls") or NO_CONTROLS,
    )


def _planned(ensemble: Mapping[str, Any]) -> tuple[Replica, ...]:
    """Return the replicas that the options of an ensemble ask for."""
    sweep, mode = ensemble.get("sweep"), ensemble.get("sweep_mode", "cross")
    return planned_replicas(ensemble["seeds"], sweep=sweep, mode=mode) if ensemble.get("seeds") else ()


def _seed_folders(folder: Path, excluded: Mapping[str, str]) -> list[str]:
    """Return the names of the seeds that were trained or left out."""
    found = {seed.name for seed in folder.glob("seed_*") if is_replica(seed.name) and is_trained(seed)}
    return sorted({*found, *excluded}, key=natural_sort_key)
