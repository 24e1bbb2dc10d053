"""The figures that a run's report has."""

from __future__ import annotations

from collections.abc import Sequence

from seedlora.names import LONG_SEED, MEAN_SEED
from seedlora.records.report import AdapterRow, Report, WeightRecord
from seedlora.records.results import LossRecord
from seedlora.records.selection import Selection
from seedlora.report.drawing import Interval, Palette
from seedlora.report.front_view import front_labels
from seedlora.report.plots import (
    Dot,
    against_score,
    candidate_losses,
    cosine_matrix,
    distributions,
    domains,
    gain_curve,
    heat_map,
    losses,
    methods,
    scores,
    spectra,
    subset_losses,
    swept_losses,
)


def figures(report: Report) -> dict[str, str]:
    """Draw all figures that a run's report allows, as SVG by name."""
    palette = Palette(report["seeds"])
    drawn: dict[str, str] = {}
    if report["tests"]:
        drawn["front"] = scores("front", report["tests"][0], palette, front_labels(report))
    elif curves := report["training"]["validation"] or report["training"]["train"]:
        drawn["front"] = losses("front", curves, palette)
    for i, test in enumerate(report["tests"]):
        drawn[f"scores-{i}"] = scores(f"scores-{i}", test, palette)
        if len(rows := [row for row in test["comparisons"] if row["against"] == MEAN_SEED]) > 2:
            drawn[f"methods-{i}"] = methods(f"methods-{i}", rows, palette)
        if test["domains"]:
            drawn[f"domains-{i}"] = domains(f"domains-{i}", test)
    training = report["training"]
    for part, curves in (("train", training["train"]), ("validation", training["validation"])):
        if curves:
            drawn[part] = losses(part, curves, palette)
    drawn |= score_figures(report, palette)
    if report["selection"] is not None:
        drawn |= selection_figures(report["selection"], palette)
    if report["sweep"] is not None and len(report["sweep"]["rows"]) > 1:
        drawn["sweep"] = swept_losses("sweep", report["sweep"])
    if report["weights"] is not None:
        drawn |= weight_figures(report["weights"], palette)
    return drawn


def score_figures(report: Report, palette: Palette) -> dict[str, str]:
    """Draw scores over the tokens that went into an adapter, and over its loss on training rows."""
    drawn = {}
    rows = [row for row in report["adapters"] if row["value"] is not None]
    tokens = _dots(rows, [row["tokens"] for row in rows])
    if any(dot.adapter == LONG_SEED and dot.x for dot in tokens):
        drawn["budget"] = against_score("budget", tokens, "tokens trained on", palette, lines=len(rows), counts=True)
    sample = report["train_sample"]
    if sample is None:
        label = "training loss at the end (nats per token)"
        dots = _dots(rows, [row["train_loss"] for row in rows])
    else:
        label = f"loss on {sample['rows']:,} training rows (nats per token)"
        dots = _dots(rows, [_interval(row["sample_loss"]) for row in rows])
    if len(dots) > 1:
        drawn["loss-score"] = against_score("loss-score", dots, label, palette, lines=len(rows))
    return drawn


def _interval(loss: LossRecord | None) -> Interval | None:
    return None if loss is None else Interval(loss["value"], loss["low"], loss["high"])


def _dots(rows: Sequence[AdapterRow], places: Sequence[float | Interval | None]) -> list[Dot]:
    """Return the adapters that have both a score and a place."""
    return [
        Dot(row["adapter"], Interval(100 * row["value"], 100 * row["low"], 100 * row["high"]), place)
        for row, place in zip(rows, places, strict=True)
        if place is not None and row["value"] is not None and row["low"] is not None and row["high"] is not None
    ]


def selection_figures(selection: Selection, palette: Palette) -> dict[str, str]:
    """Draw the validation losses of the rules that were tried, and of subsets of the seeds."""
    drawn = {}
    if selection["candidates"] and selection["chosen"] is not None:
        tried, chosen = selection["candidates"], selection["chosen"]["name"]
        if any(row["method"] == "seedlora_gain" for row in tried):
            drawn["gain-curve"] = gain_curve("gain-curve", tried)
        if len(others := [row for row in tried if row["method"] != "seedlora_gain" or row["name"] == chosen]) > 2:
            drawn["candidates"] = candidate_losses("candidates", others, chosen)
    if selection["subsets"]:
        drawn["subsets"] = subset_losses("subsets", selection["subsets"], palette)
    return drawn


def weight_figures(weights: WeightRecord, palette: Palette) -> dict[str, str]:
    """Draw cosines, spectra, distributions and gains of adapters, as SVG by name."""
    drawn, layers = {}, weights["layers"]
    if weights["cosines"]:
        drawn["pairs"] = cosine_matrix("pairs", weights["seeds"], weights["cosines"])
        cosines = [row["mean_cosine"] for row in layers]
        drawn["cosines"] = heat_map("cosines", layers, cosines, "mean pairwise cosine")
    drawn["spectra"] = spectra("spectra", weights["spectra"]["singular_values"], palette)
    drawn["distributions"] = distributions("distributions", weights["distributions"], palette)
    gains = [row["applied_gain"] for row in layers]
    if weights["cosines"] and any(gain is not None for gain in gains):
        drawn["gains"] = heat_map("gains", layers, gains, "norm of fused / norm of the seeds' mean")
    return drawn
