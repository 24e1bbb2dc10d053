"""Everything that must pass: style, types, import contracts, the site, tests. Arguments go to pytest."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

CHECKS = (
    ("ruff", "check", "."),
    ("ruff", "format", "--check", "."),
    ("mypy",),
    ("lint-imports",),
    ("mkdocs", "build", "--strict", "--quiet"),
    # One process per test file, on as many cores as there are, up to four: most of the time goes to starting runs.
    ("pytest", "-q", "-n", str(min(4, os.cpu_count() or 1)), "--dist", "loadfile"),
)
#: Where a GPU is, in a process of its own: the other tests do not see it.
ON_A_GPU = ("pytest", "-q", "tests/devices/test_gpu.py")


def main(arguments: list[str]) -> int:
    """Run all checks, also after a failure; returns 1 if any failed."""
    failed = []
    tools = Path(sys.executable).parent
    gpu = shutil.which("nvidia-smi") is not None
    for name, *options in (*CHECKS, ON_A_GPU) if gpu else CHECKS:
        extra = arguments if name == "pytest" else []
        print("$", name, *options, *extra, flush=True)
        device = {"SEEDLORA_TEST_DEVICE": "cuda"} if (name, *options) == ON_A_GPU else {}
        environment = {"OMP_NUM_THREADS": "1", "NO_MKDOCS_2_WARNING": "1", **os.environ, **device}
        command = [tools / name, *options, *extra]
        if subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, check=False).returncode:
            failed.append(name)
    print("failed: " + ", ".join(failed) if failed else "all checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
