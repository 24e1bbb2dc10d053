"""Write a report as a page: one list of sections, rendered as HTML that stands alone and as Markdown."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jinja2

from seedlora.records.report import COMPARISON_REPORT, REPORT, ComparisonReport, Report
from seedlora.report.drawing import INK, Palette
from seedlora.report.facts import facts
from seedlora.report.parts import Drawings, Section
from seedlora.report.plots import run_differences
from seedlora.report.sections import paired_table, runs_table, sections
from seedlora.report.several_runs import ComparedRun, compare_runs, read_items
from seedlora.report.weights import LAYERS
from seedlora.utils.files import write_text
from seedlora.utils.places import without_home


def write_report(
    run: str | Path, *, layers: str = LAYERS, on_layer: Callable[[str], object] = lambda _path: None
) -> Report:
    """Write ``report.json``, ``report.md`` and ``report.html`` into a run's folder; the same run gives the same bytes.

    Args:
        run: the folder, of a finished or an unfinished run.
        layers: whose entries are counted, as in :func:`seedlora.report.facts.facts`.
        on_layer: called with each layer's path when it is done.

    Returns:
        The content of ``report.json``.

    Raises:
        ValueError: as :func:`seedlora.report.facts.facts`.
    """
    report = facts(run, layers=layers, on_layer=on_layer)
    colours = Palette(report["seeds"]).colours
    on_page = {label: colour.replace(INK, "currentColor") for label, colour in colours.items()}
    _write_pages(Path(run), report["title"], report["verdict"], sections(report), on_page)
    write_text(Path(run) / REPORT.name, without_home(REPORT.text(report)))
    return report


def write_comparison(runs: Sequence[Report], folders: Sequence[str | Path], out: str | Path) -> ComparisonReport:
    """Write the same three files about several runs side by side.

    Args:
        runs: the report of each.
        folders: where each is, for the outcomes of its test items.
        out: the folder to write into.

    Returns:
        The content of ``report.json``.
    """
    if len({run["run"] for run in runs}) < len(runs):
        paths = [Path(folder).resolve() for folder in folders]
        above = os.path.commonpath(paths)
        runs = [{**run, "run": str(path.relative_to(above))} for run, path in zip(runs, paths, strict=True)]
    compared = [ComparedRun(run, read_items(folder)) for run, folder in zip(runs, folders, strict=True)]
    report = compare_runs(compared)
    # Rows are runs, which have no colours, whatever they are called.
    _write_pages(Path(out), f"{len(runs)} SeedLoRA runs", report["verdict"], _comparison_sections(report), {})
    write_text(Path(out) / COMPARISON_REPORT.name, without_home(COMPARISON_REPORT.text(report)))
    return report


def _comparison_sections(report: ComparisonReport) -> list[Section]:
    """Return the sections of a comparison of several runs, in order."""
    picture = run_differences("runs", report["runs"])
    drawings = Drawings({} if picture is None else {"runs": picture})
    line = (
        "Scores are in percent, differences in points with intervals of "
        f"{report['confidence_percent']} %, paired by item. The spread is the standard deviation of the seeds' scores, "
        "the cosine the mean over pairs of seeds. Two runs stand against each other where they were tested on the same "
        "items."
    )
    tables = [runs_table(report["runs"]), *([paired_table(report["paired"])] if report["paired"] else [])]
    pictures = drawings.picture("runs", "Fused adapter against mean seed, paired by item.")
    return [
        Section("Verdicts", items=[f"{row['run']}: {row['verdict']}" for row in report["runs"]]),
        Section("Scores", [line], tables, pictures),
        Section("What is missing", items=report["missing"]),
    ]


def _write_pages(
    folder: Path, title: str, verdict: str, sections: Sequence[Section], colours: Mapping[str, str]
) -> None:
    """Write ``report.html`` and ``report.md``.

    Args:
        folder: to write into.
        title: of the page.
        verdict: its first sentence.
        sections: of the page; empty ones are left out.
        colours: of adapters, by label.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("seedlora.report", "."),
        autoescape=lambda name: name is not None and ".html" in name,  # noqa: S701 - Markdown has no use for entities
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|")
    environment.filters["unbroken"] = lambda text: text.replace(" %", "\u00a0%").replace("n = ", "n\u00a0=\u00a0")
    shown = [section for section in sections if not section.is_empty]
    for name in ("report.html", "report.md"):
        text = environment.get_template(f"{name}.j2").render(
            title=title, verdict=verdict, sections=shown, colours=colours
        )
        write_text(folder / name, without_home(text))  # a report is sent to others
