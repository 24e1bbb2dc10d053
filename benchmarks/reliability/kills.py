"""Kill tiny runs at uniformly random moments, and go on with them to the same bits.

The clock is the CPU time of the process, so that a busy machine does not move the moments, from the begin of ``main``
to the end of the report. After the kill the same command with ``--resume`` has to end well and make what the
run makes that nobody killed: all adapters and all scores.
"""

from __future__ import annotations

import random
import re
import shutil
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.reliability.children import PATIENCE, Ended, cpu_seconds, fork, kill, own_places
from benchmarks.reliability.counts import Outcome
from benchmarks.reliability.runs import make_base, products, start_as_script, train, words_of


class World(NamedTuple):
    """Hold the base model, what a whole run makes, and the CPU time that it takes."""

    base: str
    products: dict[str, str]
    seconds: float


def make_world(folder: Path) -> World:
    """Run twice to the end: the first one imports what forked processes have from then on."""
    folder.mkdir(parents=True)
    base = make_base(folder / "base")
    with own_places(folder):
        whole = [train(words_of(base, folder / "runs" / name), cwd=folder) for name in ("a", "b")]
    found = [products(folder / "runs" / name) for name in ("a", "b")]
    if any(each.code for each in whole) or found[0] != found[1]:
        raise RuntimeError(f"two runs without a kill differ, or fail: {whole[0].err}{whole[1].err}")
    return World(base, found[0], min(each.seconds for each in whole))


def tried(seed: int, world: World, folder: Path) -> Outcome:
    """Kill a run at the moment of a seed, and go on."""
    started, moment = time.monotonic(), random.Random(seed).uniform(0, world.seconds)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "work").mkdir(parents=True)
    run = folder / "work" / "run"
    with own_places(folder):
        log = folder / "log"
        child = fork(lambda: start_as_script(words_of(world.base, run)), log, log, cwd=folder / "work")
        while cpu_seconds(child) < moment and time.monotonic() - started < PATIENCE:
            time.sleep(0.001)
        kill(child)
        phase = phase_of(run)
        before = {path.parent.name: path.stat().st_ino for path in run.glob("seed_*/adapter_model.safetensors")}
        ended = go_on(world.base, run)
    wrong = [ended.wrong or ended.said] if ended.code or ended.wrong else []
    if not wrong and products(run) != world.products:
        wrong.append("other products")
    # Stacks of one here: what was finished is not trained again.
    again = [name for name, node in before.items() if (run / name / "adapter_model.safetensors").stat().st_ino != node]
    wrong += [f"trained again: {', '.join(again)}"] if again else []
    case = f"killed after {moment:.2f} of {world.seconds:.2f} s, {phase}"
    return Outcome(seed, case, (ended.said,), time.monotonic() - started, "; ".join(wrong), (phase,))


def go_on(base: str, run: Path, *more: str) -> Ended:
    """Repeat the command with ``--resume``, or without where it says that nothing was begun."""
    ended = train(words_of(base, run, "--resume", *more), cwd=run.parent)
    if ended.code == 2 and "holds no run to go on with" in ended.err:
        ended = train(words_of(base, run, *more), cwd=run.parent)
    return ended


def phase_of(run: Path) -> str:
    """Return how far a run had come, by its files."""
    names = {path.name for path in run.iterdir()} if run.is_dir() else set()
    if "run.json" not in names:
        return "before training"
    if (run / "report.html").is_file():
        return "writing the report"
    if "results.json" in names:
        return "after the test"
    if "fused" in names:
        return "testing"
    if "seed_2" in names:
        return "fusing"
    if list(run.glob("checkpoints/*/*.ckpt")):
        return f"training {'seed_2' if 'seed_1' in names else 'seed_1'}, after a checkpoint"
    lines = sum(len(re.findall(r"\n", path.read_text())) for path in run.glob("metrics*.jsonl"))
    return f"between the stacks, or before a checkpoint{'' if lines else ' and a step'}"
