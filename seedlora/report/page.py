"""Write a report as a page: one list of sections, rendered as HTML that stands alone and as Markdown."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from seedlora.records.report import COMPARISON_REPORT, REPORT, ComparisonReport, Report
from seedlora.report.comparison_sections import comparison_sections
from seedlora.report.drawing import Palette
from seedlora.report.facts import facts
from seedlora.report.figures import figures
from seedlora.report.front_view import FrontView, front_of_comparison, front_of_run
from seedlora.report.parts import Drawings, Section
from seedlora.report.plots import run_differences
from seedlora.report.sections import sections
from seedlora.report.several_runs import ComparedRun, compare_runs, read_items
from seedlora.report.svg import INK
from seedlora.report.weights import LAYERS
from seedlora.utils.files import write_text
from seedlora.utils.places import without_home

HTML_NAME, MARKDOWN_NAME = "report.html", "report.md"
#: Makes a page load itself again, and keeps what was open. Only a page of a run in training has it.
RELOAD = """<noscript><meta http-equiv="refresh" content="5"></noscript>
<script>
(() => {
  const parts = [...document.querySelectorAll("details")], kept = sessionStorage.getItem(location.pathname);
  if (kept) kept.split("").forEach((state, i) => { if (parts[i]) parts[i].open = state === "1"; });
  setTimeout(() => {
    sessionStorage.setItem(location.pathname, parts.map((part) => (part.open ? "1" : "0")).join(""));
    location.reload();
  }, 5000);
})();
</script>
"""


def write_report(
    run: str | Path,
    *,
    layers: str = LAYERS,
    on_layer: Callable[[str], object] = lambda _path: None,
    reload: bool = False,
) -> Report:
    """Write ``report.json``, ``report.md`` and ``report.html`` into a run's folder; the same run gives the same bytes.

    Args:
        run: the folder, of a finished or an unfinished run.
        layers: whose entries are counted, as in :func:`seedlora.report.facts.facts`.
        on_layer: called with each layer's path when it is done.
        reload: whether the page loads itself again every few seconds, for a run in training.

    Returns:
        The content of ``report.json``.

    Raises:
        ValueError: as :func:`seedlora.report.facts.facts`.
    """
    report = facts(run, layers=layers, on_layer=on_layer)
    colours = Palette(report["seeds"]).colours
    on_page = {label: colour.replace(INK, "currentColor") for label, colour in colours.items()}
    drawings = Drawings(figures(report))
    _write_pages(Path(run), front_of_run(report, drawings), sections(report, drawings), on_page, reload=reload)
    write_text(Path(run) / REPORT.name, REPORT.text(report))
    return report


def stop_reloading(run: Path) -> None:
    """Take out of a run's page what makes it load itself again."""
    page = run / HTML_NAME
    if page.is_file() and RELOAD in (text := page.read_text(encoding="utf-8")):
        write_text(page, text.replace(RELOAD, ""))


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
    picture = run_differences("runs", report["runs"])
    drawings = Drawings({} if picture is None else {"runs": picture})
    # Rows are runs, which have no colours, whatever they are called.
    _write_pages(Path(out), front_of_comparison(report, drawings), comparison_sections(report), {})
    write_text(Path(out) / COMPARISON_REPORT.name, COMPARISON_REPORT.text(report))
    return report


def _unbroken(text: str) -> Markup:
    """Escape a sentence, and keep together what the end of a line would tear apart: ``95 %``, ``n = 80``, options."""
    text = text.replace(" %", "\u00a0%").replace("n = ", "n\u00a0=\u00a0")
    return Markup(re.sub(r"(--[\w.]+)", r'<span class="option">\1</span>', str(escape(text))))  # noqa: S704 - escaped


def _breakable(name: str) -> Markup:
    """Escape a name, and let a line end within it: after the points and underscores of an option."""
    return Markup(re.sub(r"([._])", r"\1<wbr>", str(escape(name))))  # noqa: S704 - escaped


def _write_pages(
    folder: Path,
    front: FrontView,
    sections: Sequence[Section],
    colours: Mapping[str, str],
    *,
    reload: bool = False,
) -> None:
    """Write ``report.html`` and ``report.md``.

    Args:
        folder: to write into.
        front: the first screen.
        sections: what follows; empty ones are left out.
        colours: of adapters, by label.
        reload: whether the page loads itself again.
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
    environment.filters["inline"] = lambda text: " ".join(str(text).split())
    environment.filters["unbroken"] = _unbroken
    environment.filters["breakable"] = _breakable
    shown = [section for section in sections if not section.is_empty]
    for name in (HTML_NAME, MARKDOWN_NAME):
        text = environment.get_template(f"{name}.j2").render(
            front=front,
            sections=shown,
            colours=colours,
            reload=Markup(RELOAD if reload else ""),  # noqa: S704 - written above
        )
        write_text(folder / name, without_home(text))  # a report is sent to others
