"""The page of a run: every number of it is in ``report.json``."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from seedlora.report.page import write_report
from tests.helpers.report_page import Page
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


@pytest.mark.parametrize("which", ["stored", "compared"])
def test_the_page_can_be_read_by_anybody(which, request):
    """One heading of the first order, a name for each figure and region, no dead link, nothing from the network."""
    text = (request.getfixturevalue(which) / "report.html").read_text()
    page = Page(text)
    tags = [tag for tag, _ in page.elements]
    assert len(text.encode()) < 2**20
    assert tags.count("h1") == tags.count("main") == tags.count("nav") == tags.count("header") == 1
    assert ("html", {"lang": "en"}) in page.elements
    assert len(page.ids) == len(set(page.ids))
    assert {link for link in page.links if link[0] != "#"} == {link for link in page.links if link.startswith("data:")}
    assert {link[1:] for link in page.links if link[0] == "#"} <= set(page.ids)
    contents = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    parts = [attributes["id"] for tag, attributes in page.elements if attributes.get("class") == "section"]
    assert contents == [f"#{part}" for part in parts]
    regions = [attributes["aria-label"] for _, attributes in page.elements if attributes.get("role") == "region"]
    assert len(regions) == len(set(regions))
    for tag, attributes in page.elements:
        if tag == "svg" or attributes.get("role") == "region":
            assert attributes["aria-label"].strip()
            assert (attributes["role"], attributes.get("tabindex")) in (("img", None), ("region", "0"))
        if tag == "th":
            assert attributes == {"scope": "col"}
        if tag == "button":
            assert attributes["type"] == "button"
    # Beside the names of XML's own spaces, which nobody loads.
    assert set(re.findall(r"https?://[^\s\"'<)]+", text)) == {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "@import" not in text
    assert "fetch(" not in text


def test_names_prompts_and_answers_are_escaped(stored, tmp_path):
    bad = "<script>alert('\\\\')</script>{{ 7 * 7 }}"
    run = shutil.copytree(stored, tmp_path / "a <b>run & more")
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    for line in lines:
        line |= {"prompt": bad, "expected": bad, "forced": dict.fromkeys(line["forced"], bad + "!")}
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report(run)
    text = (run / "report.html").read_text()
    assert text.count("<script>") == 1
    assert "alert(" in text
    assert "&lt;script&gt;alert(&#39;" in text
    assert "a &lt;b&gt;run &amp; more" in text
    assert "<b>run" not in text
    found = json.loads((run / "report.json").read_text())
    assert found["examples"]["shown"][0]["prompt"] == bad
