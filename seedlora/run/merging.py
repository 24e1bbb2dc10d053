"""Merge the seeds of a run, once all are trained, into its folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.progress import TaskProgressColumn, TimeRemainingColumn

from seedlora.adapters.adapter import is_model, is_trained
from seedlora.merge.adapter_folders import merge_folders
from seedlora.merge.bound_rule import BoundRule, MergeRule
from seedlora.merge.into_base import merge_into_base
from seedlora.merge.record import tells_of
from seedlora.model.loading import resolve_base_model
from seedlora.model.weight_files import WeightFiles
from seedlora.names import NO_MERGE, RESULTS_NAME, SAMPLES_NAME, SELECTION_NAME, SOUP
from seedlora.run.ensemble import Ensemble
from seedlora.utils.files import remove_folder
from seedlora.utils.options import name_option
from seedlora.utils.progress import progress_bar
from seedlora.utils.say import say


def merge_run(ensemble: Ensemble, rule: BoundRule | None = None) -> Path | None:
    """Merge the seeds' folders, if all that were not excluded are there and a method was asked for.

    Their soup is written beside, unless it is what was asked for. Where just this merge is there already it stays, with
    what a test said of it; after another one what was said of the older is removed, and said to be. With ``none`` an
    older merge is removed.

    Args:
        ensemble: the run.
        rule: what was chosen. Default: the rule of the run.

    Returns:
        The folder of the fused adapter, or None if nothing was merged.

    Raises:
        ValueError: if the rule is still to be chosen.
    """
    if ensemble.pending or not ensemble.trained:
        return None
    folder = ensemble.folder
    if not ensemble.pending_controls:
        # Of a run that was killed after its last adapter was written.
        folder.forget_checkpoints(())
    if ensemble.rule is None:
        _remove_fused(ensemble)
        return None
    if rule is None and ensemble.comparison.chooses:
        raise ValueError(f"{ensemble.comparison.validated_for} chooses on validation rows: call Trainer.validate")
    chosen = rule or ensemble.compared.rule
    assert chosen is not None
    seeds = [ensemble.adapter_path(name) for name in ensemble.trained]
    has_soup = not (ensemble.comparison.is_soup or len(seeds) == 1)
    there = is_trained(ensemble.fused_path) and is_trained(folder.path / SOUP) == has_soup
    if there and (fusion := folder.fusion) is not None and tells_of(fusion, chosen, seeds, folder.path):
        return ensemble.fused_path
    _forget_said(ensemble, selection=rule is None)
    write: Callable[..., Path] = merge_folders
    if is_model(seeds[0]):
        settings = folder.settings or {}
        write = partial(_merge_models, base=resolve_base_model(settings["model.base_model"]))
    if has_soup:
        write(seeds, folder.path / SOUP, method=SOUP)
    else:
        remove_folder(folder.path / SOUP)
    return write(seeds, ensemble.fused_path, method=chosen)


def _forget_said(ensemble: Ensemble, *, selection: bool) -> None:
    """Remove what a test said of an earlier merge, and what validation said of an earlier choice; say so."""
    names = (RESULTS_NAME, SAMPLES_NAME, *([SELECTION_NAME] if selection else []))
    if removed := [name for name in names if (ensemble.dirpath / name).is_file()]:
        for name in removed:
            (ensemble.dirpath / name).unlink()
        say(f"{ensemble.dirpath}: removed {' and '.join(removed)}, said of an earlier merge; the test says it anew")


def _remove_fused(ensemble: Ensemble) -> None:
    """Remove what an earlier command fused, and say so."""
    otherwise = ensemble.merged_otherwise
    if removed := ensemble.folder.forget_fused():
        made = otherwise.made if otherwise else "another run"
        asked = name_option("ensemble.merge", NO_MERGE)
        say(f"{asked} merges nothing: removed {' and '.join(removed)}, which were made by {made}")


def _merge_models(folders: Sequence[Path], out: Path, *, base: str, method: str | MergeRule) -> Path:
    """Merge whole models with a bar: it takes minutes where they are large."""
    weights = WeightFiles(base)
    matrices = sum(len(weights.shape(key)) == 2 for key in weights.files)
    with progress_bar(TaskProgressColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task(f"Merging whole models by {getattr(method, 'name', method)}", total=matrices)
        return merge_into_base(folders, base, out, method=method, on_layer=lambda _: progress.advance(task))
