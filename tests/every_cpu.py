"""The suite as other processors compute: torch's kernels of each generation, on one thread and two.

Arguments go to pytest. Takes as long as six runs of the suite.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

#: Of ``ATEN_CPU_CAPABILITY``; the first is what this machine has. The products of MKL change with it.
CAPABILITIES = (None, "avx2", "default")
THREADS = (1, 2)


def main(arguments: list[str]) -> int:
    """Run all, also after a failure; returns 1 if any failed."""
    cores, said = os.cpu_count() or 1, []
    for capability, threads in product(CAPABILITIES, THREADS):
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if capability is not None:
            environment["ATEN_CPU_CAPABILITY"] = capability
        processes = str(max(1, min(4, cores // threads)))
        command = [sys.executable, "-m", "pytest", "-q", "-n", processes, "--dist", "loadfile", *arguments]
        name, began = f"{capability or 'as it is'}, {threads} thread{'s' * (threads > 1)}", time.monotonic()
        print(f"$ {name}: {' '.join(command)}", flush=True)
        done = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, check=False)
        verdict = "failed" if done.returncode else "passed"
        said.append(f"{verdict}: {name}, {time.monotonic() - began:.0f} s")
    print(*said, sep="\n")
    return int(any(line.startswith("failed") for line in said))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
