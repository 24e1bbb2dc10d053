"""Count the outcomes of many cases, each of a seed of its own, in a file that the next call goes on from."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from seedlora.utils.files import write_text


@dataclass(frozen=True)
class Outcome:
    """Hold what became of one case.

    Args:
        seed: by which it can be made again.
        case: what was done to what.
        said: what each command said: ``done``, or its sentence.
        seconds: of all commands.
        wrong: what should not have happened; empty if nothing is wrong.
        kinds: in which it is counted, for example ``done`` or ``refused`` of each command.
    """

    seed: int
    case: str
    said: tuple[str, ...]
    seconds: float
    wrong: str = ""
    kinds: tuple[str, ...] = ()


def count(
    tried: Callable[[int], Outcome],
    seeds: int | Sequence[int],
    out: Path | None,
    *,
    command: str,
    stop: float = float("inf"),
) -> list[Outcome]:
    """Try the cases that are not in the file yet, and keep the counts of all and the outcomes that are wrong.

    Args:
        tried: makes the case of a seed, and tries it.
        seeds: how many there are, or which, for a few that are looked at again; these are not kept.
        out: the file; None keeps nothing.
        command: that makes the file.
        stop: the moment of the monotonic clock at which no further case is begun.
    """
    stored: dict[str, Any] = {"command": command, "done": 0, "kinds": {}, "slowest": 0.0, "wrong": []}
    if out is not None and out.is_file():
        stored = json.loads(out.read_text(encoding="utf-8")) | {"command": command}
    kinds, found, last = Counter(stored["kinds"]), [], time.monotonic()
    for seed in range(stored["done"], seeds) if isinstance(seeds, int) else seeds:
        if time.monotonic() > stop:
            break
        outcome = tried(seed)
        found.append(outcome)
        kinds.update(outcome.kinds)
        stored |= {"done": seed + 1, "kinds": dict(sorted(kinds.items()))}
        stored["slowest"] = max(stored["slowest"], round(outcome.seconds, 2))
        if outcome.wrong:
            stored["wrong"].append(asdict(outcome))
            print(f"seed {seed}: {outcome.case}: {outcome.wrong}", flush=True)
        if out is not None and time.monotonic() - last > 5:
            write_text(out, json.dumps(stored, indent=1) + "\n")
            last = time.monotonic()
    if out is not None:
        write_text(out, json.dumps(stored, indent=1) + "\n")
    return found
