"""Runs to report on."""

from __future__ import annotations

import json
import shutil

import pytest

from seedlora.report.page import write_report
from tests.helpers.report_runs import CONTROLS, items, train_into, with_items


@pytest.fixture(scope="session")
def stored(tiny_llama, tmp_path_factory):
    """A run of three seeds; not to be edited."""
    folder = tmp_path_factory.mktemp("runs") / "a_run"
    assert train_into(folder, tiny_llama) == 0
    # The tiny model gets nothing right: outcomes as a better one would have them.
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps(with_items(results, items(120))))
    write_report(folder)
    return folder


@pytest.fixture(scope="session")
def compared(tiny_llama, tmp_path_factory):
    """A run with everything: a method chosen, others beside it, all controls, sub-domains."""
    folder = tmp_path_factory.mktemp("runs") / "compared"
    options = ["--merge", "auto", "--compare", "ties,model_stock", "--controls"]
    assert train_into(folder, tiny_llama, *options, "--data.task_options", '{"min_terms": 2, "max_terms": 4}') == 0
    results = json.loads((folder / "results.json").read_text())
    outcomes = items(120)
    for i, label in enumerate([*CONTROLS, "ties", "model_stock"]):
        outcomes[label] = outcomes["soup"][i + 1 :] + outcomes["soup"][: i + 1]
    terms = [str(2 + i % 3) for i in range(120)]
    (folder / "results.json").write_text(json.dumps(with_items(results, outcomes) | {"domains": {"num_terms": terms}}))
    write_report(folder)
    return folder


@pytest.fixture
def run(stored, tmp_path):
    """A copy to take things away from."""
    return shutil.copytree(stored, tmp_path / "a_run")
