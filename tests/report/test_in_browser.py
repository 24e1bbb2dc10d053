"""Reports as Chromium shows them, on a desktop and on a phone, in light and in dark."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from seedlora.report.page import write_comparison, write_report

BROWSER = Path(__file__).parent / "browser"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
LACKS = [
    *([] if CHROMIUM else ["Chromium"]),
    *([] if shutil.which("node") else ["node"]),
    *([] if (BROWSER / "node_modules").is_dir() else ["npm ci in tests/report/browser"]),
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(LACKS), reason=f"the page is looked at in a browser, which needs {', '.join(LACKS)}"),
]


def look(page: Path) -> list[dict]:
    """Return what a browser finds on a page, in two widths and two schemes of colours."""
    command = ["node", str(BROWSER / "look.mjs"), str(CHROMIUM), str(page)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(looks: list[dict]) -> None:
    """See that nothing sticks out, is unnamed or pale, or fails."""
    assert [(seen["width"], seen["scheme"]) for seen in looks] == [
        (width, scheme) for width in (1280, 390) for scheme in ("light", "dark")
    ]
    for seen in looks:
        where = f"{seen['width']} px, {seen['scheme']}"
        assert (seen["errors"], seen["faults"], seen["sticksOut"]) == ([], [], []), where
        assert seen["scrolls"] <= 0, where
        # The contents stay in view on a desktop; on a phone the folded parts are their own contents.
        assert seen["opened"] == (True if seen["width"] == 1280 else None), where
        assert seen["sorted"] == sorted(seen["sorted"], reverse=True), where


@pytest.mark.parametrize("which", ["stored", "compared"])
def test_a_report_on_a_desktop_and_on_a_phone(which, request):
    run = request.getfixturevalue(which)
    looks = look(run / "report.html")
    check(looks)
    scores = json.loads((run / "report.json").read_text())["tests"][0]["scores"]
    for seen in looks:
        assert seen["hover"].split(":")[0] in [row["adapter"] for row in scores]
        assert seen["folded"] > 5


def test_the_answer_fits_on_one_screen_of_a_phone(stored, tmp_path):
    """In a folder whose name is as long as that of a run without a name of its own."""
    run = shutil.copytree(stored, tmp_path / "2026-11-30_19-08-50")
    config = (run / "config.yaml").read_text().splitlines()
    config = [f"  dirpath: runs/{run.name}" if line.startswith("  dirpath:") else line for line in config]
    (run / "config.yaml").write_text("\n".join(config) + "\n")
    write_report(run)
    for seen in look(run / "report.html"):
        assert seen["front"] <= seen["height"]


def test_a_comparison_on_a_desktop_and_on_a_phone(stored, compared, tmp_path):
    runs = [stored, compared]
    write_comparison([write_report(run) for run in runs], runs, tmp_path)
    check(look(tmp_path / "report.html"))
