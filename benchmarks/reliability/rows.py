"""Read mutated row files: only our own errors, none over a minute, nothing written outside the folder.

Each file is a good one (JSON, CSV, parquet, gzip, in a form of a well-known data set) with a few bytes or values
changed at random, by a seed of its own. It is read as `InstructionData` reads it, with bad rows as errors and with bad
rows skipped, and as two tasks of `evaluate`. Right is: rows, or a ValueError or OSError that names the file.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from transformers import AutoTokenizer

from benchmarks.reliability.children import own_places
from benchmarks.reliability.counts import Outcome
from seedlora.datamodules import InstructionData
from seedlora.evaluation.items import load_items
from tests.helpers.models import save_tiny_llama

SECONDS = 60.0
CHAT = [{"role": "user", "content": "Hi \u00fc"}, {"role": "assistant", "content": "Yo \U0001f600"}]
CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
FORMS: list[dict[str, Any]] = [
    {"prompt": "Hi", "response": "Yo"},
    {"messages": [{"role": "system", "content": "Be."}, *CHAT, *CHAT]},
    {"messages": [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}, CHAT[1]]},
    {"messages": [CHAT[0], {**CHAT[1], "weight": 0, "reasoning_content": "Hm."}, *CHAT]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}], "tools": "[]"},
    {"prompt": CHAT[:1], "completion": CHAT[1:]},
    {"instruction": "A", "input": "b", "output": "c", "system": "Be.", "history": [["q", "a"]]},
    {"instruction": "A", "context": "b", "response": "c", "category": "qa"},
    {"question": "1+1?", "answer": "It is.\n#### 2"},
]
VALUES: list[Any] = [None, "", " ", 0, -1, 1e308, True, [], {}, [[]], "\ud83d", "x" * 100_000, "\0", ["a"], {"a": {}}]


def mutated_file(seed: int) -> tuple[str, bytes]:
    """Return the name and the content of a file that is nearly good."""
    rng = random.Random(seed)
    rows = [json.loads(json.dumps(rng.choice(FORMS))) for _ in range(rng.randint(1, 6))]
    for _ in range(rng.randint(0, 2)):
        _change_value(rng, rows)
    ending = rng.choice([".jsonl", ".json", ".JSON", ".jsonl.gz", ".csv", ".parquet", ".txt"])
    data = _written(rng, rows, ending)
    for _ in range(rng.choice([0, 0, 1, 1, 2, 8])):
        data = _change_bytes(rng, data)
    return f"rows{ending}", gzip.compress(data) if ending.endswith(".gz") and rng.random() < 0.8 else data


def _change_value(rng: random.Random, rows: list[Any]) -> None:
    """Put a strange value somewhere into the rows."""
    place: Any = rows
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return
        key = rng.choice(keys)
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.3:
            if isinstance(place, dict) and rng.random() < 0.3:
                place[rng.choice(["role", "extra", "weight", "content", "tools"])] = rng.choice(VALUES)
            else:
                place[key] = rng.choice(VALUES)
            return
        place = inner


def _written(rng: random.Random, rows: list[Any], ending: str) -> bytes:
    if ending == ".parquet":
        try:
            stream = io.BytesIO()
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
            return stream.getvalue()
        except (pyarrow.ArrowException, AttributeError, TypeError, UnicodeError):
            ending = ".jsonl"  # such rows are no table
    if ending == ".csv":
        lines = [",".join(f'"{value}"' for value in row.values()) for row in rows if isinstance(row, dict)]
        first = rows[0] if isinstance(rows[0], dict) else {"a": 1}
        return "\n".join([",".join(first), *lines]).encode("utf-8", "replace")
    layout = rng.choice(["lines", "list", "data", "indented"])
    if layout == "lines":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if layout == "indented":
        return "\n".join(json.dumps(row, indent=1) for row in rows).encode()
    return json.dumps({"data": rows} if layout == "data" else rows).encode()


def _change_bytes(rng: random.Random, data: bytes) -> bytes:
    at, other = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
    low, high = sorted((at, other))
    changes: list[Callable[[], bytes]] = [
        lambda: data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :],
        lambda: data[:at],
        lambda: data[:low] + data[high:],
        lambda: data + data[low:high],
        lambda: data[:at] + rng.choice([b"\n", b"\r", b"\0", b"[", b"{", b'"', b"\xff", b"\xef\xbb\xbf"]) + data[at:],
        lambda: rng.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\n\n", b"PAR1", b"\x1f\x8b"]) + data,
        lambda: data[:at] + b"[" * 20_000 + data[at:],
        lambda: data[:at] + b"9" * 6_000 + data[at:],
    ]
    return rng.choice(changes)()


def tried(seed: int, tokenizer: Any, place: Path) -> Outcome:
    """Read one mutated file in each way."""
    name, data = mutated_file(seed)
    said, wrong, started = [], "", time.monotonic()
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    with own_places(place):
        folder = str(place)
        os.environ["SEEDLORA_CACHE"] = f"{folder}/cache"
        file = Path(folder) / name
        file.write_bytes(data)

        def read(on_bad_row: str, style: str) -> str:
            module = InstructionData(str(file), on_bad_row=on_bad_row, style=style, val_fraction=0, test_fraction=0)
            module.tokenizer = tokenizer
            module.setup()
            return f"{len(module.rows['train'])} rows"

        readers: list[Callable[[], str]] = [
            lambda: read("error", "chat"),
            lambda: read("skip", "auto"),
            lambda: read("skip", "plain"),
            lambda: f"{len(load_items('rows', path=file))} items",
            lambda: f"{len(load_items('gsm8k', path=file))} items",
        ]
        for reader in readers:
            try:
                said.append(reader())
            except (ValueError, OSError) as error:
                said.append(str(error).replace(folder, "")[:200])
                if name not in str(error) and "no training rows" not in str(error):
                    wrong = f"names no file: {error}"[:300]
            except Exception as error:  # what is looked for
                said.append(type(error).__name__)
                wrong = f"{type(error).__name__}: {error}"[:300]
        if strange := {path.name for path in Path(folder).iterdir()} - {name, "cache", "home", "tmp"}:
            wrong = f"wrote {', '.join(strange)}"
    seconds = time.monotonic() - started
    kinds = tuple("read" if text.split()[-1] in ("rows", "items") else "refused" for text in said)
    return Outcome(seed, name, tuple(said), seconds, wrong or ("slow" if seconds > SECONDS else ""), kinds)


def make_world(folder: Path) -> Any:
    """Return the tokenizer of a tiny model, with a chat template."""
    folder.mkdir(parents=True)
    save_tiny_llama(folder, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer
