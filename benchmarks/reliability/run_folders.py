"""Mutate the folders of runs: each is reported, tested and gone on with to the same bits, or a sentence says why not.

Each case is the folder of a finished tiny run, or of one that was killed in training, with a few of its files changed
at random. Wrong is: a traceback, an exit code without a sentence, more than a minute, a file outside the folder, and
products that differ from those of the run that was not touched, where the files that were changed do not decide them.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.reliability.adapter_mutations import VALUES
from benchmarks.reliability.children import SECONDS, Ended, fork, kill, own_places, run_command
from benchmarks.reliability.counts import Outcome
from benchmarks.reliability.runs import make_base, products, start_as_script, train, words_of
from seedlora.cli import main as commands


class World(NamedTuple):
    """Hold the base model, a finished run, one that was killed, and what both make."""

    base: str
    finished: Path
    killed: Path
    products: dict[str, str]


def make_world(folder: Path) -> World:
    """Run to the end, and once more until a checkpoint of the second stack is there."""
    (folder / "runs").mkdir(parents=True)
    base = make_base(folder / "base")
    finished, killed = folder / "runs" / "finished", folder / "runs" / "killed"
    with own_places(folder):
        ended = train(words_of(base, finished), cwd=folder)
        if ended.code or ended.wrong:
            raise RuntimeError(f"the good run fails: {ended.err}")
        log = folder / "log"
        child = fork(lambda: start_as_script(words_of(base, killed)), log, log, cwd=folder)
        until = time.monotonic() + 5 * SECONDS
        while not list(killed.glob("checkpoints/seed_2/step=4.ckpt")) and time.monotonic() < until:
            time.sleep(0.001)
        kill(child)
    return World(base, finished, killed, products(finished))


def tried(seed: int, world: World, folder: Path) -> Outcome:
    """Change the folder of a seed, and go on with it."""
    started, rng = time.monotonic(), random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    work = folder / "work"
    which = rng.choice(["finished", "killed"])
    # The folder has the name that it had, as its records may say it.
    shutil.copytree(world.finished if which == "finished" else world.killed, work / "run", symlinks=True)
    said, decides = [], False
    for _ in range(rng.choice([1, 1, 2])):
        changed = _change(rng, work / "run")
        said.append(changed.said)
        decides = decides or changed.decides
    with own_places(folder):
        ended = _run_all(rng, world, work, which)
    wrong = [f"{name}: {each.wrong}" for name, each in ended.items() if each.wrong]
    strange = {path.name for path in work.iterdir()} - {"run"}
    strange |= {path.name for path in folder.iterdir()} - {"work", "home", "tmp", "cache"}
    wrong += [f"wrote {', '.join(sorted(strange))}"] if strange else []
    same = ended["resume"].code == 0 and not decides
    if same and (found := products(work / "run")) != world.products:
        names = sorted(name for name in {*found} | {*world.products} if found.get(name) != world.products.get(name))
        wrong.append(f"other products: {', '.join(names)}")
    kinds = [f"{name}, {'done' if each.code == 0 else 'refused'}" for name, each in ended.items()]
    kinds += ["the same products"] if same else []
    lines = tuple(f"{name}: {each.said}" for name, each in ended.items())
    return Outcome(
        seed, f"{which}: {'; '.join(said)}", lines, time.monotonic() - started, "; ".join(wrong), tuple(kinds)
    )


def _run_all(rng: random.Random, world: World, work: Path, which: str) -> dict[str, Ended]:
    """Report the run, go on with it, and perhaps test it again."""
    ended = {"report": run_command(commands.main, ["report", "run"], cwd=work)}
    ended["resume"] = train(words_of(world.base, "run", "--resume"), cwd=work)
    if which == "finished" and rng.random() < 0.3:
        ended["test"] = train(["test", "--ensemble.dirpath", "run"], cwd=work)
    return ended


class _Changed(NamedTuple):
    """Say what was changed, and whether that decides on the products in a way that nobody could know of."""

    said: str
    decides: bool = False


def _change(rng: random.Random, run: Path) -> _Changed:
    """Change one file of a run."""
    files = sorted(path for path in run.rglob("*") if path.is_file() and path.suffix not in (".html", ".md"))
    file = rng.choice(files)
    name = str(file.relative_to(run))
    if file.suffix == ".json" and rng.random() < 0.6:
        return _change_json(rng, file, name)
    data = file.read_bytes()
    at = rng.randrange(len(data) + 1)
    changes: dict[str, Callable[[], object]] = {
        "cut": lambda: file.write_bytes(data[:at]),
        "flipped": lambda: file.write_bytes(
            data[:at] + bytes([data[at % len(data)] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        ),
        "empty": lambda: file.write_bytes(b""),
        "removed": file.unlink,
        "a folder": lambda: (file.unlink(), file.mkdir()),
        "a link": lambda: (file.unlink(), file.symlink_to("/etc/hostname")),
        "nested": lambda: file.write_bytes(b"[" * 100_000),
    }
    how = rng.choice(list(changes))
    if not data and how == "flipped":
        how = "empty"
    changes[how]()
    # An adapter that is trained has no second copy.
    weights = file.name.endswith(".safetensors") and how == "flipped"
    return _Changed(
        f"{name} {how} at {at}", weights or name in ("seed_1/adapter_config.json", "seed_2/adapter_config.json")
    )


def _change_json(rng: random.Random, file: Path, name: str) -> _Changed:
    """Change a value or a key somewhere in a JSON file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError):
        return _Changed(f"{name} left")
    place: Any = found
    path = []
    while isinstance(place, dict | list) and place:
        key: Any = rng.choice(list(place) if isinstance(place, dict) else list(range(len(place))))
        path.append(str(key))
        if not isinstance(place[key], dict | list) or not place[key] or rng.random() < 0.2:
            break
        place = place[key]
    if not path:
        return _Changed(f"{name} left")
    if rng.random() < 0.25:
        del place[key]
        how = "removed"
    else:
        place[key] = rng.choice(VALUES)
        how = f"= {str(place[key])[:20]!a}"
    file.write_text(json.dumps(found), encoding="utf-8")
    return _Changed(f"{name}: {'.'.join(path)[:60]} {how}", decides=True)
