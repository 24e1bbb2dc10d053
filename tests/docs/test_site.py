"""The pages: their links, what is made of the code in them, and the site that is built of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import seedlora
from docs.hooks.filled_in import filled_in
from docs.hooks.repository_files import LINK, links, place_in_repository, place_on_site, with_site_links
from seedlora.cli.main import COMMANDS
from seedlora.cli.train_help import train_options
from tests.helpers.paths import DOCS, ROOT

PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted(DOCS.glob("*.md"))]
PAGES += sorted((ROOT / "benchmarks").rglob("*.md"))


@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page):
    lost = []
    for target, anchor in links((ROOT / page).read_text(encoding="utf-8")):
        file = (ROOT / page).parent / target if target else ROOT / page
        if not file.exists() or (anchor and anchor.removeprefix("#") not in anchors(file)):
            lost.append(target + anchor)
    assert lost == []


def anchors(page: Path) -> set[str]:
    """The anchors of a page, as GitHub and the site make them of its headings and lists of options."""
    text = filled_in(page.read_text(encoding="utf-8"))
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    given = set(re.findall(r"\{ #(\S+)", text))
    headings = [re.sub(r"\{.*\}$", "", heading).strip() for heading in re.findall(r"^#+ (.*)$", text, flags=re.M)]
    return given | {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_a_lost_link_is_found():
    assert links("[a](b.md#c), ![d](e.svg), [f](https://g)\n```\n[h](i)\n```\n") == [("b.md", "#c"), ("e.svg", "")]
    assert LINK.search("[a](<b>)")
    assert anchors(DOCS / "comparison.md") >= {"train-longer-or-fuse", "the-verdict"}
    assert "model_r" in anchors(DOCS / "options.md")


@pytest.mark.parametrize("path", ["README.md", "docs/data.md", "benchmarks/README.md", "examples/own_datamodule.py"])
def test_a_place_on_the_site_is_that_of_one_file(path):
    assert place_in_repository(place_on_site(path)) == path


def test_links_out_of_the_pages_stay_on_the_site():
    text = "[a](../benchmarks/README.md#data), [b](../examples/own_datamodule.py), [c](data.md), [d](#e)"
    there = "[a](repository/benchmarks/README.md#data), [b](repository/examples/own_datamodule.py.md)"
    there += ", [c](data.md), [d](#e)"
    assert with_site_links(text, "docs/data.md") == there
    assert with_site_links("[a](docs/data.md)", "README.md") == "[a](data.md)"
    assert with_site_links("[a](../docs/data.md)", "benchmarks/README.md") == "[a](../../data.md)"


@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in PAGES])
def test_a_list_begins_after_an_empty_line(page):
    """GitHub does without one, the site does not."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    assert re.findall(r"^(?!\s|[-*|#]|\d+\.).+\n[-*|] .*", text, flags=re.M) == []


def test_the_site_names_every_page():
    named = re.findall(r"^ +- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.M)
    assert sorted(page.name for page in DOCS.glob("*.md")) == sorted({*named} - {"index.md"} - generated(named))


def generated(named: list[str]) -> set[str]:
    return {name for name in named if name.startswith("repository/")}


def test_every_option_is_in_the_reference():
    text = filled_in((DOCS / "options.md").read_text(encoding="utf-8"))
    ours = [option["names"][0] for group in train_options()["groups"] for option in group["options"]]
    assert len(ours) > 40
    for name in (name for name in ours if "." in name.lstrip("-") and not name.endswith(".help")):
        assert f"#### `{name}`" in text, name
    for name in ("--data.path", "--data.mix", "--data.task", "--data.prompt_field"):
        assert f"#### `{name} " in text, name
    assert text.count("#model_r ") == 1


def test_every_command_is_in_the_reference():
    page = (DOCS / "commands.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\w+)$", page, flags=re.M) == list(COMMANDS)
    text = filled_in(page)
    assert "filled in:" not in text
    for option in ("#merge_density", "#evaluate_task", "#preview_rows", "#serve_dry_run", "#report_out"):
        assert f"{option} " in text, option


def test_public_names_are_in_the_reference():
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    for name in {*seedlora.__all__} - {"__version__"}:
        assert f"::: {seedlora._HOMES[name]}.{name}\n" in page


def test_readme_is_short_and_has_its_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 90
    assert text.count("\n<!-- test command -->\n```sh\n") == 1
    for page in DOCS.glob("*.md"):
        assert len(re.findall(r"^# ", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), flags=re.M)) == 1


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_loads_nothing_from_a_network(tmp_path):
    pytest.importorskip("mkdocstrings", reason="the extra docs is not installed")
    command = [Path(sys.executable).parent / "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | QUIET)
    assert done.returncode == 0, done.stderr
    pages = {page.parent.name: page.read_text(encoding="utf-8") for page in (tmp_path / "site").rglob("index.html")}
    assert len(pages) > 30
    for name, html in pages.items():
        assert re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"?(?:https?:)?//[^>]*>", html) == [], name
        assert "<!-- filled in:" not in html
    assert "SeedEnsembleCallback" in pages["api"]
    assert not re.search(r":(class|func|meth):|\.\. math::|&gt;&gt;&gt;</p>", pages["api"])
    assert yaml.safe_load((ROOT / "mkdocs.yml").read_text().replace("!!", ""))["theme"]["font"] is False


#: Without the theme's word on what comes after mkdocs 1.
QUIET = {"NO_MKDOCS_2_WARNING": "1"}
