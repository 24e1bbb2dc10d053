"""Count what kills, full disks and mutated inputs do: ``python -m benchmarks.reliability PART --count N``.

The same command goes on where it was interrupted. The results are in ``benchmarks/reliability/PART.json``, each with
its command.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

from benchmarks.reliability.parts import PARTS, prepare

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--count", type=int, help="how many cases there are to be in all")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further case after so many")
    parser.add_argument("--seeds", type=int, nargs="*", help="try these again, say what happens, and keep nothing")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    from transformers.utils.logging import disable_progress_bar

    from benchmarks.reliability.counts import count

    disable_progress_bar()
    out = Path(__file__).with_name(f"{options.part}.json")
    seeds = options.seeds or options.count or PARTS[options.part].count
    command = f"python -m benchmarks.reliability {options.part} --count {options.count or PARTS[options.part].count}"
    stop = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="reliability-") as folder:
        tried = prepare(options.part, Path(folder))
        found = count(tried, seeds, None if options.seeds else out, command=command, stop=stop)
    if options.seeds:
        for outcome in found:
            print(outcome.seed, outcome.case, *outcome.said, f"{outcome.seconds:.1f} s", outcome.kinds, sep="\n  ")
    else:
        print(out.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
