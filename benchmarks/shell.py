"""Measure how soon the shell answers: whole processes, in processor seconds, beside the least that each could take.

    python benchmarks/shell.py                     # three 7B-shaped adapters of rank 8, bfloat16
    python benchmarks/shell.py --layers 2 --repeat 1   # a short look

``merge`` is compared with a process that imports torch, reads the same files and writes as many bytes (the copy);
``inspect`` with one that imports torch; what needs no torch with Python's own start; a run's start with Lightning's
import. All take turns, so that a ratio compares what ran side by side. Prints the medians of processor seconds, peak
memory and ratios; ``--out`` writes them as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

SEEDS = 3
ROOT = Path(__file__).parent.parent
COPY = """
import sys
import torch
from safetensors.torch import load_file, save_file
*sources, out = sys.argv[1:]
read = [{key: tensor.clone() for key, tensor in load_file(source).items()} for source in sources]
side = {"A": 0, "B": 1}
save_file({key: torch.cat([one[key] for one in read], side[key.split("lora_")[1][0]]) for key in read[0]}, out)
"""
#: Transformers knows the layers of this base model by its configuration alone.
BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_attention_heads": 32,
    "vocab_size": 32000,
}


class Measured(NamedTuple):
    """Processor seconds of a process, and the most memory that it held, in MiB; files that it maps count."""

    seconds: float
    peak_mib: float


def measure(command: list[str], expected: int) -> Measured:
    """Run a process on one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, *command], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != expected:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode} in the place of {expected}")
    return Measured(used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def write_adapters(root: Path, layers: int) -> None:
    """Write adapters of a base model that is not there, and the same of one whose configuration is."""
    from merge import SHAPES, make_stacks  # benchmarks/merge.py, which is beside this file

    from seedlora.adapters.writing import universal_config, write_adapter
    from seedlora.updates.factors import LoRAFactors

    hidden, ffn, _, _ = SHAPES["7b"]
    (root / "base").mkdir()
    config = BASE | {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers}
    (root / "base" / "config.json").write_text(json.dumps(config))
    stacks = make_stacks("7b", layers)
    for n in range(SEEDS):
        factors = {path: LoRAFactors(s.A[n : n + 1], s.B[n : n + 1]) for path, s in stacks.items()}
        for kind, base in (("", "not-there"), ("based_", str(root / "base"))):
            write_adapter(root / f"{kind}{n}", factors, universal_config(factors, base_model=base))


def commands(root: Path) -> dict[str, tuple[list[str], str, int]]:
    """Each process, the name of the one that it is compared with, and its exit code."""
    own = ["-m", "seedlora"]
    plain, based = ([str(root / f"{kind}{n}") for n in range(SEEDS)] for kind in ("", "based_"))
    merge, train = [*own, "merge", "--out", str(root / "out")], str(ROOT / "train.py")
    files = [str(Path(folder) / "adapter_model.safetensors") for folder in plain]
    return {
        "python": (["-c", "pass"], "", 0),
        "import torch": (["-c", "import torch"], "", 0),
        "import lightning": (["-c", "import lightning.pytorch"], "", 0),
        "copy": (["-c", COPY, *files, str(root / "copy.safetensors")], "", 0),
        "seedlora --help": ([*own, "--help"], "python", 0),
        "seedlora methods": ([*own, "methods"], "python", 0),
        "train.py --help": ([train, "--help"], "python", 0),
        "train.py --merge sedlora": ([train, "--merge", "sedlora"], "python", 2),
        "train.py --data Nope": ([train, "--data", "Nope"], "import lightning", 2),
        "seedlora merge --help": ([*merge, "--help"], "import torch", 0),
        "seedlora inspect": ([*own, "inspect", plain[0]], "import torch", 0),
        "seedlora inspect, base there": ([*own, "inspect", based[0]], "import torch", 0),
        "seedlora merge": ([*merge, *plain], "copy", 0),
        "seedlora merge, base there": ([*merge, *based], "copy", 0),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32, help="of the model")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write_adapters(options.write, options.layers)
        return
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        # In a process of its own: Linux counts the memory of who starts a process as if that had held it.
        writing = [sys.executable, __file__, "--write", str(root), "--layers", str(options.layers)]
        subprocess.run(writing, check=True)
        all_commands = commands(root)
        found: dict[str, list[Measured]] = {name: [] for name in all_commands}
        for turn in range(options.repeat + 1):
            for name, (command, _, expected) in all_commands.items():
                shutil.rmtree(root / "out", ignore_errors=True)
                measured = measure(command, expected)
                if turn:  # the first one brings files into memory
                    found[name].append(measured)
    table = Table("process", "seconds", "MiB", "beside", "ratio")
    results = {}
    for name, (_, beside, _) in all_commands.items():
        seconds = statistics.median(one.seconds for one in found[name])
        peak = statistics.median(one.peak_mib for one in found[name])
        results[name] = {"seconds": seconds, "peak_mib": peak}
        if beside:
            pairs = zip(found[name], found[beside], strict=True)
            results[name]["ratio"] = statistics.median(ours.seconds / least.seconds for ours, least in pairs)
        ratio = f"{results[name]['ratio']:.2f}" if beside else ""
        table.add_row(name, f"{seconds:.2f}", f"{peak:.0f}", beside, ratio)
    Console().print(table)
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
