"""Say in the terminal, after a test, what it found and which adapter to use."""

from __future__ import annotations

from rich.table import Table

from seedlora.run.ensemble import Ensemble
from seedlora.scores.choices import choice_sentences
from seedlora.scores.tables import results_table, verdict


def left_out(ensemble: Ensemble) -> list[str]:
    """Say which replicas and controls were left out, and why."""
    return [f"{name} was left out: {reason}." for name, reason in ensemble.excluded.items()]


def conclusion(ensemble: Ensemble) -> list[Table | str]:
    """Return the scores of the last test, which adapter to use, and what the test showed of the fused one.

    Args:
        ensemble: the run; without a test it tells what the validation rows said.
    """
    told: list[Table | str] = []
    if ensemble.results is not None:
        method = ensemble.method_name if ensemble.rule is not None else ""
        told += ["", results_table(ensemble.results, method=method)]
    advice = ensemble.advice
    told += [*advice["headline"], *advice["sentences"], *choice_sentences(ensemble.folder.selection)]
    if ensemble.results is not None:
        told.append(verdict(ensemble.results))
    return told
