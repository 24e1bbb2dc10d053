"""Where does an ensemble of seeds beat what costs the same?

    python -m benchmarks.study --plan                      # the cells, what is done, what is left
    python -m benchmarks.study --minutes 60                # go on for an hour; killed anywhere, the next call goes on
    python -m benchmarks.study --base embedded --minutes 8 --accelerator gpu
    python -m benchmarks.study --summary                   # tables and figures of all cells that are done

``--base small``, the default, takes a model of a million weights that ``small_base.py`` trains once, so that there are
enough cells for intervals; ``--base embedded`` is SmolLM2-135M, a hundred times as slow, which says whether the same
holds of a real model. What is asked, and what would prove each idea wrong, is in ``design.py``. Results are lines of
``results/``, one a cell; the adapters stay under ``--work``.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.study.design import RATES, TASKS, Cell, design
from benchmarks.study.floors import find_floor
from benchmarks.study.summary import show
from benchmarks.study.training import Setting
from seedlora.utils.files import write_text
from seedlora.utils.progress import plain_console

RESULTS, WORK = Path(__file__).parent / "results", Path("runs/study")
SMALL = "small"


class Study:
    """The cells of one base model, and what is known of them.

    Args:
        base: ``small``, ``embedded``, or a folder.
        work: where adapters are kept.
        accelerator: Lightning's word.
        only: a word in the names of the cells that are meant; two processes can do those of two tasks.
    """

    def __init__(self, base: str, work: Path, accelerator: str, only: str) -> None:
        self.label, self.is_small = Path(base).name, base == SMALL
        self.setting = Setting(str(work / SMALL) if base == SMALL else base, work / f"cells_{self.label}", accelerator)
        self._lines_path, self._floors_path = RESULTS / f"{self.label}.jsonl", RESULTS / f"{self.label}_floors.json"
        self.tasks = {label: task for label, task in TASKS.items() if label.startswith(only) or label in only}
        self._only, self.console = only, plain_console()

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Return the lines of the cells that are done."""
        if not self._lines_path.is_file():
            return []
        return [json.loads(line) for line in self._lines_path.read_text().splitlines()]

    @property
    def floors(self) -> dict[str, Any]:
        """Return what is known of each task's floor."""
        return json.loads(self._floors_path.read_text()) if self._floors_path.is_file() else {}

    @property
    def left(self) -> list[Cell]:
        """Return the cells that are not done, in their order."""
        done = [line["cell"] for line in self.lines]
        cells = [cell for cell in design(small=self.is_small) if self._only in cell.name]
        return [cell for cell in cells if json.loads(json.dumps(asdict(cell))) not in done]

    def go_on(self, minutes: float) -> None:
        """Find the floors and do cells until the time is up; a cell that was begun is ended by the next call."""
        until = time.monotonic() + 60 * minutes
        for label, task in self.tasks.items():
            if label not in self.floors and time.monotonic() < until:
                self.console.print(f"the floor of {label}")
                found = find_floor(self.setting, label, task, rates=RATES if self.is_small else RATES[1:2])
                write_text(self._floors_path, json.dumps({**self.floors, label: found}, indent=1) + "\n")
        for cell in self.left:
            if time.monotonic() >= until:
                return
            from benchmarks.study.cells import run_cell

            self.console.print(f"{cell.name}: {len(self.left)} cells left", highlight=False)
            line = run_cell(cell, self.setting, self.floors[cell.task])
            with self._lines_path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            test = line["test"]
            ranked = sorted((scores["loss"], label) for label, scores in test.items())
            told = ", ".join(f"{label} {loss:.3f}" for loss, label in ranked)
            self.console.print(f"  {sum(line['seconds'].values())} s: {told}", highlight=False, soft_wrap=True)

    def plan(self) -> None:
        """Print what is done and what is left."""
        for label, floor in self.floors.items():
            self.console.print(
                f"{label}: floor at {floor['epochs']} epochs, rate {floor['rate']:g}, loss {floor['loss']:.3f}"
            )
        self.console.print(f"{len(self.lines)} cells done; left: {', '.join(cell.name for cell in self.left)}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=SMALL)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--only", default="", help="cells with this word in their name")
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    study = Study(args.base, args.work, args.accelerator, args.only)
    if args.summary:
        show(study.label, study.lines, study.floors, study.console, RESULTS)
    elif args.plan:
        study.plan()
    else:
        args.work.mkdir(parents=True, exist_ok=True)
        RESULTS.mkdir(exist_ok=True)
        with (args.work / f"{study.label}{args.only}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if args.base == SMALL and not (args.work / SMALL / "config.json").is_file():
                from benchmarks.study.small_base import make

                make(args.work / SMALL)
            study.go_on(args.minutes)


if __name__ == "__main__":
    main()
