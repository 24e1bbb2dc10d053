"""Tokenising a data set of MetaMathQA's size and shape, once, and starting with it again.

    python benchmarks/data.py [--rows 395000] [--tokenizer embedded]

Generates rows with MetaMathQA's columns and about its lengths, then starts twice in fresh processes with an empty
cache: the first start tokenises, the second maps what is on the disk. Prints time and peak memory of both, and the
padding of a forward of three seeds, 8 rows each, in optimizer steps of 8 and of 128 rows, and with packed rows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TIME_LIMIT, SECOND_TIME_LIMIT, SECOND_MEMORY_LIMIT = 600.0, 10.0, 1.5
NAMES = ("Tom", "Maria", "Amir", "the baker", "a farmer", "Mr. Lee", "each student", "the train", "Julia", "Carlos")
VERBS = ("buys", "sells", "gives away", "collects", "paints", "counts", "carries", "divides", "saves", "borrows")
THINGS = ("apples", "marbles", "boxes of pencils", "miles", "dollars", "square tiles", "pages", "hours", "oranges")
LINKS = ("so", "because", "therefore", "after that,", "on the other hand,", "if", "and", "which means that")


def sentence(rng: random.Random) -> str:
    """About 85 characters."""
    return (
        f"{rng.choice(NAMES)} {rng.choice(VERBS)} {rng.randint(2, 999)} {rng.choice(THINGS)} {rng.choice(LINKS)} "
        f"{rng.choice(NAMES)} {rng.choice(VERBS)} {rng.randint(2, 99)} more {rng.choice(THINGS)}."
    )


def row(rng: random.Random) -> dict[str, str]:
    """A query of about 240 characters and a response of about 560, as MetaMathQA has on average, both skewed."""
    query = " ".join(sentence(rng) for _ in range(1 + min(7, int(rng.expovariate(0.5)))))
    steps = [
        f"{sentence(rng)} ${rng.randint(2, 99)} \\times {rng.randint(2, 99)} = {rng.randint(4, 9999)}$."
        for _ in range(1 + min(30, int(rng.expovariate(0.23))))
    ]
    answer = rng.randint(0, 9999)
    response = "\n".join(steps) + f"\n#### {answer}\nThe answer is: {answer}"
    return {"type": "GSM_Rephrased", "original_question": query, "query": query, "response": response}


def generate(path: Path, rows: int) -> None:
    """Write the rows, the same every time."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            file.write(json.dumps(row(rng)) + "\n")


def start(path: str, tokenizer: str) -> None:
    """One start, as train.py has it: read or make the rows, then give the first batch."""
    from seedlora.datamodules import MetaMathQA
    from seedlora.datamodules.sampler import ReplicaSampler
    from seedlora.model.loading import load_tokenizer

    imported = time.time()
    data = MetaMathQA(path)
    data.tokenizer = load_tokenizer(tokenizer)
    data.setup()
    data.seeds = (11, 42, 202)
    next(iter(data.train_dataloader()))
    ready, cpu = time.time(), time.process_time()
    train = data.rows["train"]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    step = {"seeds": data.seeds, "batch_size": 8, "accumulate": 16}
    padding = {
        "rows as they come": ReplicaSampler(train, seeds=data.seeds, batch_size=8).padding(),
        "like lengths together": ReplicaSampler(train, **step).padding(),
        "packs of 2048": ReplicaSampler(train, **step, pack_tokens=2048).padding(),
    }
    found = {
        "ready": ready,
        "imported": imported,
        "cpu": cpu,
        "GiB": memory,
        "rows": len(train),
        "tokens": int(train.lengths.sum()),
    }
    print(json.dumps({**found, "padding": padding}))


def main() -> int:
    """Two starts; 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=395_000)
    parser.add_argument("--tokenizer", default="embedded", help="a base model: embedded, a folder, or a hub id")
    parser.add_argument("--start", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        start(options.start, options.tokenizer)
        return 0
    from seedlora.model.loading import resolve_base_model

    model = resolve_base_model(options.tokenizer)
    print(f"load of the machine before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "MetaMathQA-395K.jsonl"
        generate(path, options.rows)
        print(f"{options.rows:,} rows, {path.stat().st_size / 1e6:,.0f} MB")
        command = [sys.executable, __file__, "--start", str(path), "--tokenizer", model]
        environment = {**os.environ, "SEEDLORA_CACHE": str(Path(scratch) / "cache")}
        found = []
        for name in ("first start", "second start"):
            began = time.time()
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            found.append(json.loads(done.stdout))
            found[-1]["seconds"] = found[-1]["ready"] - began
            imports = found[-1]["imported"] - began
            print(
                f"{name}: {found[-1]['seconds']:.1f} s to the first batch, {imports:.1f} s of them imports; "
                f"{found[-1]['cpu']:.1f} s of processor time, peak memory {found[-1]['GiB']:.2f} GiB"
            )
    first, second = found
    print(f"{first['tokens']:,} tokens, {first['tokens'] / first['rows']:.0f} per row")
    print("padding: " + ", ".join(f"{name} {part:.1%}" for name, part in second["padding"].items()))
    held = (
        first["seconds"] <= TIME_LIMIT,
        second["seconds"] <= SECOND_TIME_LIMIT,
        second["GiB"] <= SECOND_MEMORY_LIMIT,
    )
    print(f"under 10 min, 10 s and 1.5 GiB: {', '.join('yes' if ok else 'NO' for ok in held)}")
    return 0 if all(held) else 1


if __name__ == "__main__":
    raise SystemExit(main())
