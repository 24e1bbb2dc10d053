"""Let the disk of tiny runs be full, or a byte of their checkpoint flip, and go on with them to the same bits.

A full disk is a file system in memory of a random size, which is enlarged before the run goes on; where mounting is not
allowed, a limit on the size of files. Until then the run has to end with one sentence.
"""

from __future__ import annotations

import random
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.reliability.children import own_places, run_command
from benchmarks.reliability.counts import Outcome
from benchmarks.reliability.kills import World, go_on, make_world, phase_of
from benchmarks.reliability.run_folders import World as KilledWorld
from benchmarks.reliability.run_folders import make_world as make_killed
from benchmarks.reliability.runs import products, start_as_script, words_of

__all__ = ["make_killed", "make_world", "tried", "tried_flip"]


def tried(seed: int, world: World, folder: Path) -> Outcome:
    """Run on a disk that is too small by the seed's choice, make room, and go on."""
    started, rng = time.monotonic(), random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "work").mkdir(parents=True)
    run, size = folder / "work" / "run", rng.randrange(4_096, 400_000)
    with own_places(folder), _small_disk(folder / "work", size) as mounted:
        words = words_of(world.base, run)
        ended = run_command(start_as_script if mounted else _Limited(min(size, 60_000)), words, cwd=folder)
        phase = phase_of(run)
        wrong = [f"on the full disk: {ended.wrong}"] if ended.wrong else []
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=64m", str(folder / "work")], check=True)
        again = go_on(world.base, run)
        wrong += [again.wrong or again.said] if again.code or again.wrong else []
        if not wrong and products(run) != world.products:
            wrong.append("other products")
    kind = "the disk was large enough" if ended.code == 0 else f"full: {phase}"
    case = f"{size} bytes, {'a file system' if mounted else 'a limit on files'}"
    said = (ended.said, again.said)
    return Outcome(seed, case, said, time.monotonic() - started, "; ".join(wrong), (kind,))


class _Limited:
    """Run with files of at most so many bytes."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __call__(self, words: Sequence[str]) -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self._size, resource.RLIM_INFINITY))
        return start_as_script(words)


@contextmanager
def _small_disk(folder: Path, size: int) -> Iterator[bool]:
    """Mount a file system of so many bytes; give whether that is allowed here."""
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = subprocess.run(words, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def tried_flip(seed: int, world: KilledWorld, folder: Path) -> Outcome:
    """Flip one bit of the newest checkpoint of a run that was killed, and go on."""
    started, rng = time.monotonic(), random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    run = folder / "work" / "run"
    shutil.copytree(world.killed, run)
    file = rng.choice(sorted(run.glob("checkpoints/*/*.ckpt")))
    data = bytearray(file.read_bytes())
    at, bit = rng.randrange(len(data)), rng.randrange(8)
    data[at] ^= 1 << bit
    file.write_bytes(data)
    with own_places(folder):
        ended = go_on(world.base, run)
        refused = f"{file} is damaged" in ended.err
        if refused and not ended.wrong:  # the sentence says what to do
            file.unlink()
            ended = go_on(world.base, run)
    wrong = [ended.wrong or ended.said] if ended.code or ended.wrong else []
    if not wrong and products(run) != world.products:
        wrong.append("other products")
    taken = "refused as damaged, removed as the sentence says" if refused else "taken: the bit decides nothing"
    case = f"bit {bit} of byte {at} of {len(data)}"
    return Outcome(seed, case, (ended.said,), time.monotonic() - started, "; ".join(wrong), (taken,))
