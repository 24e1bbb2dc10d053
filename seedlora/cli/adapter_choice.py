"""Find the adapters that are meant by the folder of a run, of an adapter or of a whole model, or by a hub id."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from seedlora.adapters.adapter import is_trained, locate
from seedlora.names import FUSED, SETTINGS_NAME, SOUP
from seedlora.records.report import REPORT_ADVICE
from seedlora.updates.diagnostics import natural_sort_key
from seedlora.utils.places import expanded


@dataclass(frozen=True)
class AdapterChoice:
    """Hold the folders that are meant.

    Args:
        folders: by name; the first is the one to ask.
        why: why that one, or nothing.
        run: the run that they are of; None if they are of none.
    """

    folders: Mapping[str, Path]
    why: str
    run: Path | None = None

    @property
    def first(self) -> str:
        """Return the name of the adapter to ask."""
        return next(iter(self.folders))

    def with_named(self, names: Iterable[str]) -> AdapterChoice:
        """Return the choice with what else of the run is named: trained controls and their means."""
        if self.run is None:
            return self
        named = {name: self.run / name for name in names if name and is_trained(self.run / name)}
        return replace(self, folders={**self.folders, **named})


def choose_adapters(source: str) -> AdapterChoice:
    """Return what a source holds: all adapters of a run, the one it advises first, or a single adapter or model.

    Raises:
        ValueError: if there is nothing.
    """
    folder = expanded(source)
    if not (folder / SETTINGS_NAME).is_file():
        found = locate(source, kind="run's folder, an adapter's folder")
        name = folder.resolve().name if folder.is_dir() else source.rpartition("/")[2]
        return AdapterChoice({name: found}, "")
    names = adapters_of_run(folder)
    if not names:
        raise ValueError(f"{folder} has no adapter yet; go on with the run by --resume")
    report = REPORT_ADVICE.read(folder)
    advised = None if report is None else report["advice"].get("folder", report["advice"]["better"])
    first, why = (advised, "which the run advises") if advised in names else (names[0], "")
    return AdapterChoice({name: folder / name for name in dict.fromkeys((first, *names))}, why, run=folder)


def adapters_of_run(folder: Path) -> list[str]:
    """Return the names of a run's adapters that are there: what was merged, then the seeds."""
    seeds = sorted((path.name for path in folder.glob("seed_*") if is_trained(path)), key=natural_sort_key)
    return [name for name in (FUSED, SOUP) if is_trained(folder / name)] + seeds
