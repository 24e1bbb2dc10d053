"""Measure one card: checks that need it, times and memory at the shape of LLaMA-2-7B, and the main job.

    python benchmarks/gpu.py --out benchmarks/results/h100.json      # at most 8 minutes, one card of 80 GB
    python benchmarks/gpu.py --tiny --out tiny.json                  # every piece, small, on a CPU

The pieces run in the order of :data:`PIECES` until the time is over, each family in a process of its own, so that one
that fails, or finds no memory, harms no other. The file is written after each piece; what did not run is in it by name.
The weights are random and made on the card from the configuration.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).parents[1]
#: Seconds of all pieces together, and those below which none is begun.
LIMIT, SHORTEST = 480, 20
WARM_UP, TIMED = 2, 3
CUDA = torch.cuda.is_available()
#: Tests that have not run on a GPU, or are cheap there.
CHECKS = "strategy or selective or quantised or main_job or compiled"
#: name, method, rows of each seed, options; in the order of what matters
TIMES: tuple[tuple[str, str, int, dict[str, Any]], ...] = (
    ("stack, selective", "stack", 8, {"gradient_checkpointing": "selective"}),
    ("stack, selective, compiled", "stack", 8, {"gradient_checkpointing": "selective", "compile": "inductor"}),
    ("stack, full", "stack", 8, {"gradient_checkpointing": "full"}),
    ("stack, full, compiled", "stack", 8, {"gradient_checkpointing": "full", "compile": "inductor"}),
    ("stack, packed to 2,048, selective", "packed", 8, {"gradient_checkpointing": "selective"}),
    ("stack, none, half the rows", "stack", 4, {"gradient_checkpointing": "none"}),
    ("stack, none, half the rows, compiled", "stack", 4, {"gradient_checkpointing": "none", "compile": "inductor"}),
    ("passes, selective", "passes", 8, {"gradient_checkpointing": "selective"}),
    ("plain loop, full", "plain", 8, {}),
    ("Trainer, full", "trainer", 8, {}),
    ("stack, nf4, selective, 8 layers", "nf4", 8, {"gradient_checkpointing": "selective", "quantization": "nf4"}),
)
#: Families of pieces, in order, and the most seconds of each.
PIECES = {"times": 300, "main job": 90, "checks": 180}


@contextmanager
def weights_made_here() -> Iterator[None]:
    """Let transformers make random weights, on the card where there is one, in the place of reading files."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(folder: str, *, config: Any = None, dtype: Any = None, **_: Any) -> Any:
        torch.manual_seed(0)
        with torch.device("cuda" if CUDA else "cpu"):
            return AutoModelForCausalLM.from_config(config or AutoConfig.from_pretrained(folder), dtype=dtype).eval()

    with mock.patch.object(AutoModelForCausalLM, "from_pretrained", make):
        yield


def packed_steps(folder: str, batch: int, steps: int, longest: int, **options: Any) -> tuple[list[float], float]:
    """Seconds of a step of three seeds with rows of real lengths in packs, and tokens of a step, padding left out."""
    import lightning.pytorch as pl
    import memory  # these are beside this file

    import train
    from seedlora.callbacks import SeedEnsembleCallback
    from seedlora.training.module import SeedLoRAModule

    setting = memory.Setting("packed", len(train.SEEDS), batch, longest, 4 * longest)
    module, clock = SeedLoRAModule(folder, r=train.RANK, lr_scheduler="constant", **options), train.Clock()
    data = memory.LargestForwards(setting, module.options.outline.vocabulary)
    with tempfile.TemporaryDirectory() as run:
        ensemble = SeedEnsembleCallback(data.seeds, merge="none", budget="full", dirpath=Path(run) / "run")
        trainer = pl.Trainer(
            max_epochs=1,
            limit_train_batches=steps,
            accelerator="gpu" if CUDA else "cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            use_distributed_sampler=False,
            callbacks=[ensemble, clock],
        )
        trainer.fit(module, datamodule=data)
    rows = data.rows["train"].lengths
    tokens = [sum(int(rows[list(part)].sum()) for part in micro.rows) for micro in data.micro_batches()]
    return clock.seconds, sum(tokens) / len(tokens)


def timed(method: str, batch: int, options: dict[str, Any], folder: str, short: str) -> dict[str, Any]:
    """Seconds of a step of three seeds, tokens per second, and peak memory."""
    import train

    common = {"kind": "512", "batch": batch, "steps": WARM_UP + TIMED}
    tokens = train.tokens_of("512", batch, train.SEEDS, 1)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    with train.quiet():
        if method == "packed":
            longest = train.ROWS["512"][0]
            seconds, tokens = packed_steps(folder, batch, WARM_UP + 1, longest, **options)
        elif method in ("stack", "passes", "nf4"):
            stack = 1 if method == "passes" else len(train.SEEDS)
            where = short if method == "nf4" else folder
            seconds = train.lightning_steps(where, train.SEEDS, stack, **common, **options)
        else:
            steps = train.plain_steps if method == "plain" else train.trainer_steps
            seconds = steps(folder, train.SEEDS, **common, checkpointing=True)
    step = median(seconds[WARM_UP:])
    peak = torch.cuda.max_memory_allocated() if CUDA else 0
    return {"seconds": step, "tokens_per_second": tokens / step, "peak_bytes": peak, "first_steps": seconds[:WARM_UP]}


def times(tiny: bool) -> None:
    """Time every method; a line of JSON for each."""
    import shapes  # these are beside this file

    import train

    name = "tiny" if tiny else "llama2_7b"
    if tiny:
        train.ROWS["512"] = (32, 16)
    with tempfile.TemporaryDirectory() as root, weights_made_here():
        folder = str(shapes.config_folder(name, Path(root)))
        shapes.SHAPES["short"] = shapes.SHAPES[name]._replace(layers=2 if tiny else 8)
        short = str(shapes.config_folder("short", Path(root)))
        for what, method, batch, options in TIMES:
            if tiny and "compile" in options:
                options = {**options, "compile": "aot_eager"}
            report(what, partial(timed, method, 2 if tiny else batch, options, folder, short))
            gc.collect()
            if CUDA:
                torch.cuda.empty_cache()
                torch._dynamo.reset()


def report(what: str, piece: Callable[[], dict[str, Any]]) -> None:
    """Print what a piece found, or why it found nothing, as a line of JSON."""
    started = time.monotonic()
    try:
        found = piece()
    except Exception as error:
        found = {"failed": f"{type(error).__name__}: {error}"[:500]}
    print(json.dumps({"piece": what, "took": time.monotonic() - started, **found}), flush=True)


def main_job(tiny: bool) -> None:
    """Do the main job from the command line: SmolLM2, the data of the defaults, three seeds, merged and scored."""
    small = ["--data.num_train", "24", "--data.num_val", "8", "--data.num_test", "8"] if tiny else []
    with tempfile.TemporaryDirectory() as run:
        command = [sys.executable, str(ROOT / "train.py"), "--merge", "seedlora", "--ensemble.dirpath", f"{run}/run"]

        def job() -> dict[str, Any]:
            subprocess.run([*command, *small], check=True, stdout=subprocess.DEVNULL, cwd=run)
            cost = json.loads((Path(run) / "run" / "cost.json").read_text(encoding="utf-8"))
            return {"phases": cost["took"], "peak_bytes": cost["peak_bytes"]}

        report("main job", job)


def checks(tiny: bool) -> None:
    """Run the tests of a GPU that have not run on one; with ``tiny`` two of them on the CPU."""
    chosen = "selective" if tiny else CHECKS
    environment = {**os.environ, "SEEDLORA_TEST_DEVICE": "cuda" if CUDA else "cpu"}
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "tests/devices/test_gpu.py", "-k"]

    def tests() -> dict[str, Any]:
        found = subprocess.run(
            [*command, chosen], check=False, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )
        lines = [
            line for line in found.stdout.splitlines() if line.startswith(("PASSED", "FAILED", "ERROR", "SKIPPED"))
        ]
        return {"code": found.returncode, "tests": lines}

    report("checks", tests)


FAMILIES = {"times": times, "main job": main_job, "checks": checks}


def run_family(family: str, *, tiny: bool, seconds: float) -> list[dict[str, Any]]:
    """Run a family of pieces in a process of its own; what it printed until its time was over counts."""
    command = [sys.executable, __file__, "--family", family, *(["--tiny"] if tiny else [])]
    with tempfile.TemporaryFile("w+") as out:
        try:
            code = subprocess.run(command, check=False, stdout=out, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            code = None
        out.seek(0)
        found = [json.loads(line) for line in out if line.startswith("{")]
    if code != 0:
        why = "out of time" if code is None else f"exit code {code}"
        found.append({"piece": f"the rest of {family}", "failed": why})
    return found


def table(pieces: list[dict[str, Any]]) -> str:
    """All pieces as a table for people."""
    lines = ["| piece | seconds of a step | tokens/s | peak, GiB | note |", "|---|---|---|---|---|"]
    for piece in pieces:
        step, speed = piece.get("seconds"), piece.get("tokens_per_second")
        peak = piece.get("peak_bytes") or None
        note = piece.get("failed") or (f"took {piece['took']:.0f} s" if step is None else "")
        if "tests" in piece:
            passed = sum(line.startswith("PASSED") for line in piece["tests"])
            note = f"{passed} of {len(piece['tests'])} tests passed"
        cells = [
            piece["piece"],
            "" if step is None else f"{step:.3g}",
            "" if speed is None else f"{speed:,.0f}",
            "" if peak is None else f"{peak / 2**30:.1f}",
            note.splitlines()[0] if note else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run all pieces, write and print what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try every piece without a GPU")
    parser.add_argument("--only", choices=list(PIECES), nargs="+", default=list(PIECES))
    parser.add_argument("--seconds", type=float, default=LIMIT, help="of all pieces together")
    parser.add_argument("--out", type=Path, required="--family" not in sys.argv)
    parser.add_argument("--family", choices=list(PIECES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.family:
        FAMILIES[options.family](options.tiny)
        return
    until = time.monotonic() + options.seconds
    device = torch.cuda.get_device_name() if CUDA else "cpu"
    pieces: list[dict[str, Any]] = []
    for family in options.only:
        left = until - time.monotonic()
        if left < SHORTEST:
            pieces.append({"piece": family, "failed": "out of time", "took": 0.0})
        else:
            # A family that ends early leaves its time to the next.
            pieces += run_family(family, tiny=options.tiny, seconds=min(left, PIECES[family]))
        record = {"device": device, "torch": torch.__version__, "tiny": options.tiny, "pieces": pieces}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(table(pieces))


if __name__ == "__main__":
    main()
