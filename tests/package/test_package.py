"""What is installed: one package, which works beside folders of a user's that have our folders' names."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT


@pytest.fixture
def project(tmp_path):
    """A Lightning project as many are laid out: importing its packages in the place of ours fails."""
    for name in ("callbacks", "datamodules"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('this package is the user\\'s own')\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1?", "response": "2"}\n' * 20)
    return tmp_path


def run(*command: str, cwd: Path) -> str:
    # The folder that a command is started in comes first on the path of `python -m`, before this one.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_preview_runs_in_a_project_with_folders_of_our_names(project, tiny_llama):
    options = ["--data", "InstructionData", "--data.path", "rows.jsonl", "--model.base_model", tiny_llama]
    assert "20 rows" in run("-m", "seedlora", "preview", *options, cwd=project)


def test_training_runs_in_a_project_with_folders_of_our_names(project, tiny_llama):
    options = ["--data", "InstructionData", "--data.path", "rows.jsonl", "--model.base_model", tiny_llama]
    options += ["--ensemble.seeds", "[1,2]", "--ensemble.dirpath", "run", "--trainer.max_epochs", "2"]
    run(str(ROOT / "train.py"), *options, cwd=project)
    assert (project / "run" / "fused" / "adapter_model.safetensors").is_file()


def test_nobody_is_told_to_install_this_package_from_an_index():
    """It is on none, so anybody could take its name there."""
    files = [
        *(path for room in ("seedlora", "callbacks", "datamodules", "docs") for path in (ROOT / room).rglob("*.*"))
    ]
    texts = {path: path.read_text() for path in [*files, ROOT / "README.md"] if path.suffix in (".py", ".md", ".json")}
    assert len(texts) > 300
    found = re.compile(r"seedlora\[|pip install (-\S+ )*'?\"?seedlora\b")
    assert [str(path) for path, text in texts.items() if found.search(text)] == []


@pytest.mark.slow
def test_the_wheel_installs_one_package(tmp_path):
    # A copy: building leaves folders behind.
    source, left_out = tmp_path / "source", shutil.ignore_patterns(".*", "build", "runs", "*.egg-info")
    shutil.copytree(ROOT, source, symlinks=True, ignore=left_out)
    run("-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(source), cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"seedlora"}
    wanted = {"callbacks/seed_ensemble.py", "datamodules/rows.py"}
    assert {f"seedlora/{name}" for name in wanted} <= {*names}
