"""The page of a run: every number of it is in ``report.json``."""

from __future__ import annotations

import json
import re

import pytest

from seedlora.report.page import write_report
from tests.helpers.report_runs import check_numbers


def test_the_same_run_gives_the_same_bytes(stored, run):
    write_report(run)
    for name in ("report.json", "report.md", "report.html"):
        assert (run / name).read_bytes() == (stored / name).read_bytes()


@pytest.mark.parametrize("which", ["stored", "compared"])
def test_every_number_is_in_report_json(which, request):
    check_numbers(request.getfixturevalue(which))


def test_a_number_that_is_not_in_report_json_is_found(compared):
    html, text = (compared / "report.html").read_text(), (compared / "report.md").read_text()
    found = json.loads((compared / "report.json").read_text())
    lead = f"<td>{100 * found['tests'][0]['domains'][0]['lead']:.1f}</td>"
    seed = found["tests"][0]["scores"][1]["right"]
    (best, *_) = re.findall(r">\[\d+\]</text>", html)
    for place, other in (
        (lead, lead.replace("<td>", "<td>1")),
        (f"<td>{seed}</td>", f"<td>{seed + 1}</td>"),
        ("Mean seed ", "Mean seed 12.3, "),
        ("paired by item,", "paired by item 7,"),
        ("<pre>python -m seedlora train", "<pre>python -m seedlora train --model.r 4"),
        (best, ">[7]</text>"),  # in the heat map
    ):
        assert place in html, place
        with pytest.raises(AssertionError):
            check_numbers(compared, html=html.replace(place, other, 1))
    for place, other in ((f"| {seed} |", f"| {seed + 1} |"), ("Mean seed ", "Mean seed 12.3, ")):
        assert place in text, place
        with pytest.raises(AssertionError):
            check_numbers(compared, text=text.replace(place, other, 1))
