"""Facts and figures as a page: one list of sections, rendered as HTML that stands alone and as Markdown."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from seedlora.report.facts import facts
from seedlora.report.figures import INK, colours, run_differences
from seedlora.report.sections import Picture, Section, paired_table, runs_table, sections
from seedlora.report.several_runs import comparison, first_items
from seedlora.report.stored import Facts
from seedlora.report.weights import LAYERS
from seedlora.utils.files import write_text

NAME = "report"


def write_report(
    run: str | Path, *, layers: str = LAYERS, on_layer: Callable[[str], object] = lambda _path: None
) -> Facts:
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
    found = facts(run, layers=layers, on_layer=on_layer)
    _write(Path(run), found, f"SeedLoRA run {found['run']}", found["verdict"], sections(found))
    return found


def write_comparison(runs: Sequence[Facts], folders: Sequence[str | Path], out: str | Path) -> Facts:
    """The same three files about several runs side by side, from the facts of each and the outcomes in its folder."""
    if len({run["run"] for run in runs}) < len(runs):
        paths = [Path(folder).resolve() for folder in folders]
        above = os.path.commonpath(paths)
        runs = [{**run, "run": str(path.relative_to(above))} for run, path in zip(runs, paths, strict=True)]
    found = comparison(runs, [first_items(folder) for folder in folders])
    picture = run_differences("runs", found["runs"])
    sections = [
        Section("Verdicts", items=[f"{row['run']}: {row['verdict']}" for row in found["runs"]]),
        Section(
            "Scores",
            [
                "Scores are in percent, differences in points with bootstrap intervals of "
                f"{found['confidence_percent']} %, paired by item. The spread is the standard deviation of the seeds' "
                "scores, the cosine the mean over pairs of seeds. Two runs stand against each other where they were "
                "tested on the same items."
            ],
            [runs_table(found["runs"]), *([paired_table(found["paired"])] if found["paired"] else [])],
            [] if picture is None else [Picture(Markup(picture), "Fused adapter against mean seed, paired by item.")],  # noqa: S704 - drawn by us
        ),
        Section("What is missing", items=found["missing"]),
    ]
    title = f"{len(runs)} SeedLoRA runs"
    _write(Path(out), found, title, found["verdict"], sections)
    return found


def _write(folder: Path, found: Facts, title: str, verdict: str, sections: Sequence[Section]) -> None:
    shown = [s for s in sections if s.lines or s.tables or s.pictures or s.items or s.code]
    # In a comparison of runs, rows are runs, whatever they are called.
    palette = (
        {k: v.replace(INK, "currentColor") for k, v in colours(found["seeds"]).items()} if "seeds" in found else {}
    )
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
    for kind in ("html", "md"):
        text = environment.get_template(f"{NAME}.{kind}.j2").render(
            title=title, verdict=verdict, sections=shown, colours=palette
        )
        write_text(folder / f"{NAME}.{kind}", text)
    write_text(folder / f"{NAME}.json", json.dumps(found, indent=2, allow_nan=False) + "\n")
