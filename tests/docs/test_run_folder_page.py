"""``docs/run_folder.md``: the keys of the stored files, as their types have them and as a run writes them."""

from __future__ import annotations

import ast
import json
import re
import shutil
from typing import Any, Union, get_args, get_origin, is_typeddict

import pytest

from docs.hooks.record_tables import FILES, record_table
from seedlora.cli.main import main as shell
from seedlora.records.json_file import fields_of
from seedlora.records.settings import SETTINGS, RunSettings
from seedlora.run.ownership import take_folder
from tests.helpers.commands import train
from tests.helpers.paths import DOCS, ROOT

PAGE = DOCS / "run_folder.md"


def test_the_page_has_a_table_for_each_file():
    found = re.findall(r"^## (.*)\n[^#]*<!-- filled in: record (.*) -->$", PAGE.read_text(), flags=re.M)
    assert [heading.replace("`", "") for heading, _ in found] == [name for _, name in found] == list(FILES)
    assert all(len(record_table(name).splitlines()) > 2 for name in FILES)


@pytest.fixture(scope="module")
def run(tiny_llama, tmp_path_factory):
    """A run that writes all files, once more with another merge, beside another run."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [{"question": f"Which is {i}?", "choices": [*"abcd"], "answer": i, "subject": "x"} for i in range(4)]
    (folder / "mmlu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = ["--model.dtype", "float32", "--data.num_test", "6", "--trainer.max_epochs", "1"]
    seeds = ["--ensemble.seeds", "[1,2]", "--ensemble.budget", "full", "--ensemble.dirpath", str(folder / "run")]
    tasks = ["--evaluate", "mmlu", "--evaluate.task_path", f"{{mmlu: {folder / 'mmlu.jsonl'}}}"]
    tasks += ["--evaluate.max_new_tokens", "2"]
    assert train(tiny_llama, *small, *seeds, *tasks, "--merge", "auto", "--compare", "ties", "--controls") == 0
    (folder / "run" / "excluded.json").write_text('{"seed_3": "training loss not finite in step 3"}')
    shutil.copytree(folder / "run", folder / "again")
    take_folder(folder / "run")
    report = ["report", str(folder / "run"), str(folder / "again"), "--out", str(folder / "comparison")]
    assert shell(report) == 0
    return folder / "run"


PLACES = {
    "control.json": "long_seed/control.json",
    "fusion.json": "fused/fusion.json",
    "report.json of several runs": "../comparison/report.json",
}


@pytest.mark.parametrize("heading", [heading for heading in FILES if heading != "evaluation/lm_eval.json"])
def test_the_files_of_a_run_have_the_keys_of_the_types(heading, run):
    file, path = FILES[heading], run / PLACES.get(heading, heading)
    found = file.read(path.parent)
    assert found is not None
    assert file.text(found) == path.read_text() or heading == "excluded.json"  # which the test has written
    unknown = [key.removeprefix("reproduce.settings.") for key in unknown_keys(found, file.content)]
    assert [key for key in unknown if not key.startswith(("model.", "data."))] == []
    if file is SETTINGS:
        assert fields_of(RunSettings).keys() <= found.keys()


def unknown_keys(value: Any, kind: Any, place: str = "") -> list[str]:
    """The keys of a JSON value that its type does not know."""
    if get_origin(kind) in (Union, type(int | None)):
        return min((unknown_keys(value, option, place) for option in get_args(kind)), key=len)
    if is_typeddict(kind) and isinstance(value, dict):
        fields = fields_of(kind)
        known = [
            key
            for name, field in fields.items()
            if name in value
            for key in unknown_keys(value[name], field.kind, f"{place}{name}.")
        ]
        return [f"{place}{key}" for key in value if key not in fields] + known
    if get_origin(kind) is dict and isinstance(value, dict):
        return [key for name in value for key in unknown_keys(value[name], get_args(kind)[1], f"{place}{name}.")]
    if get_origin(kind) is list and isinstance(value, list):
        return [key for each in value for key in unknown_keys(each, get_args(kind)[0], f"{place}[].")]
    return [place] if isinstance(value, dict | list) and kind in (int, str, float, type(None)) else []


def test_all_that_a_run_writes_is_on_the_page(run):
    names = re.findall(r"`([^`]+)`", PAGE.read_text().partition("The tables below")[0])
    for path in run.iterdir():
        written = re.sub(r"seed_\d+", "seed_11", path.name) + ("/" if path.is_dir() else "")
        written = re.sub(r"^metrics.*\.jsonl$", "metrics*.jsonl", written)
        assert written in names, written


def test_no_other_module_reads_or_writes_these_files():
    """Who opens one of them by its name would pass by its type."""
    names = {file.name for file in FILES.values()}
    found = []
    for file in sorted([*(ROOT / "seedlora").rglob("*.py"), *(ROOT / "callbacks").glob("*.py")]):
        tree = ast.parse(file.read_text())
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        found += [
            f"{file.relative_to(ROOT)}: {node.value}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and node.value in names and id(node) not in docstrings
        ]
    allowed = ("seedlora/names.py", "seedlora/records/evaluation.py")
    assert [place for place in found if not place.startswith(allowed)] == []
