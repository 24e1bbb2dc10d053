"""The scripts of ``benchmarks/``, which nothing imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "benchmarks"
READ_ALL = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
for script in sys.argv[2:]:
    runpy.run_path(script)
    print(script)
"""


def test_every_script_finds_what_it_imports():
    scripts = sorted(str(path) for path in FOLDER.glob("*.py"))
    command = [sys.executable, "-c", READ_ALL, str(FOLDER), *scripts]
    found = subprocess.run(command, check=False, capture_output=True, text=True, cwd=FOLDER.parent)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == scripts
    assert len(scripts) > 10
