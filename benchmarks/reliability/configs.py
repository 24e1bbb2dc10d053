"""Run ``train.py`` with mutated files of options: a run that obeys what is in the file, or one sentence.

Each case is the ``config.yaml`` of a tiny run with a few values, keys or bytes changed at random, run in a process of
its own. Wrong is: a traceback, an exit code without a sentence, more than a minute, a file outside the run's folder, a
finished run whose ``config.yaml`` says something else than the file did.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from benchmarks.reliability.adapter_mutations import VALUES
from benchmarks.reliability.children import own_places
from benchmarks.reliability.counts import Outcome
from benchmarks.reliability.runs import make_base, train, words_of

#: Words that some option takes, and values of every type.
WORDS: list[Any] = [
    *("auto", "none", "all", "best", "ddp", "cpu", "gpu", "full", "lora", "dora", "pissa", "rslora", "nf4", "int8"),
    *(
        "soup",
        "ties",
        "knots_ties",
        "seedlora_gain",
        "auto_gain",
        "greedy_soup",
        "branch",
        "local",
        "zip",
        "loss",
        "match",
    ),
    *(
        "linear",
        "constant",
        "bfloat16",
        "float16",
        "warn",
        "untrained",
        "equal_tokens",
        "data",
        "init",
        "rows",
        "gsm8k",
    ),
    *("seedlora.datamodules.InstructionData", "os.system", "builtins.print", "[b]x[/b]", "[v1]", "~/x", "~nobody/x"),
    *([1], [1, 1], [1, 2], [-1], ["a"], {"r": [2, 3]}, {"learning_rate": [1e-3, 2e-3]}, 0.5, 1e-3, -0.5, 1.5, 1e-320),
    *(
        2**31,
        2**63,
        -(2**63),
        "1e3",
        "yes",
        "0x10",
        "1_000",
        "2026-11-30",
        "null",
        "${HOME}",
        "!!python/name:os.system",
    ),
]
#: A second machine that never comes, which is waited for as long as Lightning says.
WAITS = ("num_nodes",)


class World(NamedTuple):
    """Hold the base model and the options of a good run."""

    base: str
    options: dict[str, Any]


def make_world(folder: Path) -> World:
    """Make the base model, and run once, also to import all that forked processes need."""
    folder.mkdir(parents=True)
    base = make_base(folder / "base")
    with own_places(folder):
        ended = train(words_of(base, folder / "run"), cwd=folder)
    if ended.code or ended.wrong:
        raise RuntimeError(f"the good run fails: {ended.err}")
    options = yaml.safe_load((folder / "run" / "config.yaml").read_text(encoding="utf-8"))
    options["data"]["init_args"] |= {"num_train": 8, "num_test": 4}
    return World(base, options)


def tried(seed: int, world: World, folder: Path) -> Outcome:
    """Run with the mutated file of a seed."""
    started, rng = time.monotonic(), random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    work = folder / "work"
    work.mkdir(parents=True)
    options = json.loads(json.dumps(world.options))
    options["ensemble"]["dirpath"] = "run"
    said, changed = [], {}
    for _ in range(rng.choice([1, 1, 1, 2])):
        note = _change(rng, options, changed)
        said.append(note)
    text = yaml.safe_dump(options, sort_keys=False)
    if rng.random() < 0.15:
        text, note = _change_text(rng, text)
        said, changed = [*said, note], {}
    (work / "options.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    with own_places(folder):
        ended = train(["--config", "options.yaml"], cwd=work)
    wrong = [ended.wrong] if ended.wrong else []
    if ended.code == 0:
        wrong += _not_obeyed(work, changed)
    strange = {path.name for path in work.iterdir()} - {"options.yaml", "run"}
    if any("ensemble" in note.split(" ")[0] or note.startswith("text") for note in said):
        strange -= {"runs", *map(str, [changed.get("ensemble.dirpath")])}
    strange |= {path.name for path in folder.iterdir()} - {"work", "home", "tmp", "cache"}
    strange |= {path.name for path in (folder / "home").iterdir()} - {".cache", ".config", ".triton", "x"}
    wrong += [f"wrote {', '.join(sorted(strange))}"] if strange else []
    kind = "done" if ended.code == 0 else "refused" if ended.code == 2 else "stopped"
    return Outcome(seed, "; ".join(said), (ended.said,), time.monotonic() - started, "; ".join(wrong), (kind,))


def _change(rng: random.Random, options: dict[str, Any], changed: dict[str, Any]) -> str:
    """Change, remove or add one key; note in ``changed`` what the file says now, by its dotted name."""
    place: Any = options
    path: list[str] = []
    while True:
        key = rng.choice([key for key in place if key not in WAITS])
        path.append(str(key))
        if not isinstance(place[key], dict) or not place[key] or rng.random() < 0.06:
            break
        place = place[key]
    how = rng.choice(["value", "value", "value", "value", "removed", "added", "renamed"])
    if how == "value":
        place[key] = rng.choice(rng.choice([VALUES, WORDS]))
        if isinstance(place[key], str):
            place[key] = place[key].encode("utf-8", "replace").decode()
        changed[".".join(path)] = place[key]
        return f"{'.'.join(path)} = {str(place[key])[:30]!a}"
    if how == "removed":
        del place[key]
        changed.pop(".".join(path), None)
    elif how == "added":
        place[rng.choice(["something", "", "0", "class_path", "callbacks", "help", "config", "--x"])] = rng.choice(
            VALUES[:9]
        )
    else:
        place[f"{key}_"] = place.pop(key)
        changed.pop(".".join(path), None)
    return f"{'.'.join(path)} {how}"


def _change_text(rng: random.Random, text: str) -> tuple[str, str]:
    """Change the file itself."""
    at = rng.randrange(len(text))
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{c}: &{c} [{','.join(['*' + chr(ord(c) - 1)] * 9)}]\n" for c in "bcdefgh"
    )
    changes: dict[str, Callable[[], str]] = {
        "cut": lambda: text[:at],
        "inserted": lambda: (
            text[:at] + rng.choice(["\0", "\t", ": ", "- ", "{", "'", "&a ", "*a", "\u2028", "%"]) + text[at:]
        ),
        "code": lambda: f"{text}x: !!python/object/apply:os.system ['touch /tmp/written']\n",
        "bomb": lambda: bomb + text,
        "twice": lambda: text + text,
        "two documents": lambda: f"{text}---\n{text}",
        "a list": lambda: "- 1\n- 2\n",
        "empty": lambda: "",
        "nested": lambda: "[" * 5000,
        "bom": lambda: "\ufeff" + text,
    }
    how = rng.choice(list(changes))
    return changes[how](), f"text: {how} at {at}"


def _not_obeyed(work: Path, changed: dict[str, Any]) -> list[str]:
    """Say what a run that ended well did not do of what the file asked for."""
    files = [file for file in (work / "run" / "config.yaml", *work.glob("*/*/config.yaml")) if file.is_file()]
    if not files:  # a few steps were asked for, or a folder elsewhere
        asked = "fast_dev_run" in str(changed) or "ensemble.dirpath" in changed
        return [] if asked else ["done, but there is no config.yaml"]
    file = files[0]
    found = yaml.safe_load(file.read_text(encoding="utf-8"))
    wrong = []
    for path, value in changed.items():
        if path == "seed_everything" and str(value).lower() == "true":  # Lightning chooses one
            continue
        stored: Any = found
        for key in path.split("."):
            stored = stored.get(key) if isinstance(stored, dict) else None
        if value not in (None, "", {}, []) and not _same(stored, value):
            wrong.append(f"{path} is {str(stored)[:60]} in config.yaml")
    return wrong


def _same(stored: Any, value: Any) -> bool:
    """Return whether a value is stored as it was given, as far as a parser may read text."""
    if isinstance(value, dict):
        return isinstance(stored, dict) and all(_same(stored.get(key), inner) for key, inner in value.items())
    if stored == value or str(stored) == str(value):
        return True
    try:
        return float(stored) == float(value)
    except (TypeError, ValueError):
        if not isinstance(value, str):
            return False
    try:
        read = yaml.safe_load(value)
    except yaml.YAMLError:
        read = None
    return stored == read or str(stored).endswith(value.replace("~", ""))
