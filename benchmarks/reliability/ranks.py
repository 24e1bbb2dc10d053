"""Kill one of two processes at uniformly random moments, under DDP, ZeRO-2 and FSDP2, and go on with the run.

The other process has to end by itself within a minute. Then the same command with ``--resume`` has to end well, and
each adapter to be within 1e-5 of that of the run that nobody killed.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from benchmarks.reliability.children import PATIENCE, children_of, cpu_seconds, fork, kill, own_places, wait_for
from benchmarks.reliability.counts import Outcome
from benchmarks.reliability.kills import go_on, phase_of
from benchmarks.reliability.runs import make_base, start_as_script, words_of

STRATEGIES = {"ddp": "ddp", "zero2": "deepspeed_stage_2", "fsdp2": "fsdp2"}
#: Seconds within which the process that is left ends.
LEFT = 60.0


class World(NamedTuple):
    """Hold the base model, the options, what a whole run makes, and the CPU time that its first process takes."""

    base: str
    options: tuple[str, ...]
    adapters: dict[str, dict[str, torch.Tensor]]
    seconds: float


def make_world(folder: Path, strategy: str) -> World:
    """Run to the end."""
    folder.mkdir(parents=True)
    base = make_base(folder / "base")
    options = ("--trainer.devices", "2", "--trainer.strategy", STRATEGIES[strategy], "--data.batch_size", "1")
    with own_places(folder):
        log = folder / "log"
        child = fork(lambda: start_as_script(words_of(base, folder / "run", *options)), log, log, cwd=folder)
        seconds = 0.0
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            with suppress(OSError):
                seconds = cpu_seconds(child)
            time.sleep(0.02)
    if ended[1]:
        raise RuntimeError(f"the good run fails: {log.read_text(encoding='utf-8')[-2000:]}")
    return World(base, options, _adapters(folder / "run"), seconds)


def tried(seed: int, world: World, folder: Path) -> Outcome:
    """Kill one process at the moment of a seed, and go on."""
    started, rng = time.monotonic(), random.Random(seed)
    moment, rank = rng.uniform(0, world.seconds), rng.choice([0, 1])
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "work").mkdir(parents=True)
    run, log = folder / "work" / "run", folder / "log"
    with own_places(folder):
        first = fork(lambda: start_as_script(words_of(world.base, run, *world.options)), log, log, cwd=folder / "work")
        while cpu_seconds(first) < moment and time.monotonic() - started < PATIENCE:
            time.sleep(0.001)
        others = children_of(first)
        rank = rank if others else 0
        with suppress(ProcessLookupError):
            os.kill(others[0] if rank else first, signal.SIGKILL)
        killed = time.monotonic()
        wrong = _others_end(first, others, rank)
        left = time.monotonic() - killed
        kill(first)
        phase = phase_of(run)
        ended = go_on(world.base, run, *world.options)
    wrong += [ended.wrong or ended.said] if ended.code or ended.wrong else []
    worst = _worst(_adapters(run), world.adapters) if not wrong else 0.0
    wrong += [f"adapters differ by {worst:.1e}"] if not worst <= 1e-5 else []
    case = (
        f"rank {rank} killed after {moment:.2f} of {world.seconds:.2f} s, {phase}; the other ended {left:.1f} s later"
    )
    return Outcome(seed, case, (ended.said,), time.monotonic() - started, "; ".join(wrong), (f"rank {rank}, {phase}",))


def _others_end(first: int, others: list[int], rank: int) -> list[str]:
    """Wait for the end of the processes that are left; say which did not end in time."""
    if rank == 1:
        code, _ = wait_for(first, LEFT)
        return [] if code not in (0, -signal.SIGKILL) else [f"rank 0 ended with {code}"]
    until = time.monotonic() + LEFT
    while others and any(map(_is_alive, others)) and time.monotonic() < until:
        time.sleep(0.05)
    return ["rank 1 did not end"] if any(map(_is_alive, others)) else []


def _is_alive(process: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def _adapters(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.parent.name: load_file(path) for path in sorted(run.glob("*/adapter_model.safetensors"))}


def _worst(found: dict[str, dict[str, torch.Tensor]], wanted: dict[str, dict[str, torch.Tensor]]) -> float:
    """Return the largest relative difference of a layer's update."""
    if found.keys() != wanted.keys():
        return float("inf")
    worst = 0.0
    for name, tensors in wanted.items():
        for key in tensors:
            if "lora_A" in key:
                other = key.replace("lora_A", "lora_B")
                updates = [each[name][other].double() @ each[name][key].double() for each in (found, wanted)]
                worst = max(worst, float((updates[0] - updates[1]).norm() / updates[1].norm()))
    return worst
