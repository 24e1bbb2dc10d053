"""The scripts in ``examples/`` run as they are, as processes of their own."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys

import pytest

from seedlora.training.module import SeedLoRAModule
from tests.helpers.paths import ROOT


def run(name, base_model, folder, cwd):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(ROOT / "examples" / name), base_model, str(folder)]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_lightning_script_with_callbacks_and_a_logger(tiny_llama, tmp_path):
    folder = tmp_path / "run"
    said = run("lightning_script.py", tiny_llama, folder, tmp_path)
    assert "The 2 seeds share max_epochs=6: each trains 3 epochs." in said
    for name in ("report.html", "config.yaml", "metrics.jsonl", "results.json", "fused", "predictions.jsonl"):
        assert (folder / name).exists(), name
    rows = list(csv.DictReader((folder / "lightning" / "csv" / "metrics.csv").open()))
    for column in ("lr-AdamW", "val/loss_fused", "test/score_fused"):
        assert any(row[column] for row in rows), column
    loaded = SeedLoRAModule.load_from_checkpoint(folder / "lightning" / "best.ckpt")
    assert [replica.name for replica in loaded.replicas] == ["seed_11", "seed_42"]
    answers = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [answer["expected"] for answer in answers] == [str(9 + b) for b in range(10)]


@pytest.mark.slow
def test_the_notebook_runs_from_its_first_cell_to_its_last(tiny_llama, tmp_path):
    pytest.importorskip("ipykernel", reason="the extra docs is not installed")
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)
    (sizes,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    sizes.source = f'base_model, number_of_rows, folder = "{tiny_llama}", 60, "runs/quickstart"'
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "runs" / "quickstart" / "report.html").is_file()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert re.search(r"^fused +\d+\.\d%", printed, flags=re.M)


@pytest.mark.slow
def test_a_script_that_starts_a_second_process(tiny_llama, tmp_path):
    said = run("two_processes.py", tiny_llama, tmp_path / "run", tmp_path)
    assert said.count("The 2 seeds share max_epochs=2") == 1
    assert said.count("report: ") == 1
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == 2
    assert len(json.loads((tmp_path / "run" / "results.json").read_text())["items"]["fused"]) == 10
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [sample["item"] for sample in samples] == [*range(10)]
    assert not (tmp_path / "run" / "owner.json").exists()
    assert (tmp_path / "run" / "config.yaml").read_text().count("strategy: ddp") == 1
