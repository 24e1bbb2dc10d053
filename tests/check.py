"""Everything that must pass: style, types, import contracts, tests. Arguments go to pytest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CHECKS = (
    ("ruff", "check", "."),
    ("ruff", "format", "--check", "."),
    ("mypy",),
    ("lint-imports",),
    ("pytest", "-q"),
)


def main(arguments: list[str]) -> int:
    """Run all checks, also after a failure; returns 1 if any failed."""
    failed = []
    tools = Path(sys.executable).parent
    for name, *options in CHECKS:
        extra = arguments if name == "pytest" else []
        print("$", name, *options, *extra, flush=True)
        if subprocess.run([tools / name, *options, *extra], cwd=Path(__file__).parents[1], check=False).returncode:
            failed.append(name)
    print("failed: " + ", ".join(failed) if failed else "all checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
