"""The command ``doctor``: what is installed on this machine and what works, as one table for a bug report.

It must run where something is broken, so nothing but the standard library is imported before it is needed, and what
fails is a line of the table. Nothing secret is in it: of a token only whether there is one, of the home folder ``~``.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from seedlora.cli.command_parser import CommandParser, run_command
from seedlora.utils.places import without_home

#: The libraries whose versions decide what a run does; those that need not be there stand last.
LIBRARIES = (
    *("seedlora", "torch", "lightning", "transformers", "tokenizers", "peft", "accelerate", "deepspeed", "safetensors"),
    *("huggingface-hub", "numpy", "gguf", "jsonargparse", "reasoning-gym", "bitsandbytes", "datasets", "lm-eval"),
    *("math-verify", "vllm"),
)
#: What each extra of the package adds.
EXTRAS = {
    "hub": "data sets of the hub, and parquet files",
    "quantization": "a base model in 4 or 8 bits: --model.quantization nf4, int8",
    "lm-eval": "the harness's tasks: evaluate --lm-eval",
    "math-verify": "answers of MATH compared as formulas",
    "docs": "the site of these pages: mkdocs serve",
}
#: Programs of others that commands start, where they are.
PROGRAMS = ("vllm", "llama-server", "llama-quantize", "convert_hf_to_gguf.py", "ollama")
#: Variables that change what is done, none of which holds a secret.
VARIABLES = (
    *("SEEDLORA_CACHE", "HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"),
    *("DS_ACCELERATOR", "PYTORCH_CUDA_ALLOC_CONF", "TOKENIZERS_PARALLELISM"),
)
_MISSING = "not installed"
#: Seconds that the hub may take, and that the files of a cache may take to be counted.
_PATIENCE = 3.0
#: The processor's units that make bfloat16 fast, by their names in /proc/cpuinfo.
_UNITS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "asimd", "bf16")


@dataclass(frozen=True)
class Finding:
    """Hold one line of the table.

    Args:
        section: what it belongs to: ``versions``, ``devices``, ...
        what: was looked at.
        found: there, in words.
    """

    section: str
    what: str
    found: str


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    return run_command(make_parser(), argv, run_doctor)


def make_parser() -> CommandParser:
    """Make the parser of the command."""
    parser = CommandParser("doctor", "Show what is installed and what works, as one table for a bug report.")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    return parser


def run_doctor(arguments: Mapping[str, Any]) -> None:
    """Print what was found."""
    findings = examine()
    if arguments["json"]:
        told: dict[str, dict[str, str]] = {}
        for finding in findings:
            told.setdefault(finding.section, {})[finding.what] = finding.found
        print(json.dumps(told, indent=2))  # noqa: T201 - what --json asks for
        return
    print(markdown(findings))  # noqa: T201 - to be copied


def markdown(findings: Iterable[Finding]) -> str:
    """Return the findings as a table of Markdown, its columns aligned."""
    rows = [(f"{f.section}: {f.what}", " ".join(f.found.split()).replace("|", "\\|")) for f in findings]
    width = max(len(what) for what, _ in rows)
    lines = [f"| {'what':{width}} | found |", f"|{'-' * (width + 2)}|-------|"]
    return "\n".join([*lines, *(f"| {what:{width}} | {found} |" for what, found in rows)])


def examine() -> list[Finding]:
    """Look at everything; what fails is said in its line."""
    with ThreadPoolExecutor(1) as pool:  # the hub may let us wait
        answer = pool.submit(_asked, _hub)
        parts = [
            ("versions", _versions),
            ("devices", _devices),
            ("memory", _memory),
            ("sandbox", _sandbox),
            ("caches", _caches),
        ]
        found = {section: _asked(look) for section, look in parts}
        found |= {"hub": answer.result(), "extras": _asked(_extras), "programs": _asked(_programs)}
    found["environment"] = _asked(_environment)
    return [Finding(section, what, without_home(text)) for section, lines in found.items() for what, text in lines]


def _asked(look: Callable[[], Iterable[tuple[str, str]]]) -> list[tuple[str, str]]:
    try:
        return list(look())
    except Exception as error:  # a broken installation is what this command is for
        reason = " ".join(str(error).split())[:200]
        return [("cannot be told", f"{type(error).__name__}: {reason}")]


def _versions() -> Iterable[tuple[str, str]]:
    yield "python", f"{platform.python_version()} ({platform.python_implementation()}), {sys.platform}"
    yield "system", f"{platform.system()} {platform.release()}, {platform.machine()}"
    for name in LIBRARIES:
        yield name, _version(name) or _MISSING


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> Iterable[tuple[str, str]]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name, units = _processor()
    yield "processor", f"{name}, {cores} cores usable; {', '.join(units) or 'no unit for bfloat16 known'}"
    import torch

    from seedlora.model.loading import fast_dtype

    yield "torch", f"{torch.get_num_threads()} threads; CUDA {torch.version.cuda or 'not in this build'}"
    yield "auto dtype", f"{str(fast_dtype()).removeprefix('torch.')}, the faster one here"
    if not torch.cuda.is_available():
        mps = torch.backends.mps.is_available()
        yield "GPU", "Apple's, through mps" if mps else "none that torch can use"
        return
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        major, minor = torch.cuda.get_device_capability(i)
        with torch.cuda.device(i):
            bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        dtypes = f"float32, float16{', bfloat16' if bfloat16 else '; bfloat16 is not native'}"
        memory = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        yield f"GPU {i}", f"{torch.cuda.get_device_name(i)}, capability {major}.{minor}, {memory}; {dtypes}"


def _processor() -> tuple[str, list[str]]:
    """Return name and units of the processor."""
    file = Path("/proc/cpuinfo")
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    flags = {*(found[1].split() if (found := re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.M)) else ())}
    return (name[1].strip() if name else platform.processor() or platform.machine()), [u for u in _UNITS if u in flags]


def _memory() -> Iterable[tuple[str, str]]:
    file = Path("/proc/meminfo")
    if file.is_file():
        sizes = dict(re.findall(r"^(\w+):\s+(\d+) kB$", file.read_text(encoding="utf-8"), re.M))
        free, total = (int(sizes[key]) * 1024 for key in ("MemAvailable", "MemTotal"))
        yield "free", f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB"
    else:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        yield "in all", f"{total / 2**30:.1f} GiB"
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if limit.is_file() and (said := limit.read_text(encoding="utf-8").strip()).isdigit() and int(said) < total:
            yield "limit of the container", f"{int(said) / 2**30:.1f} GiB"


def _sandbox() -> Iterable[tuple[str, str]]:
    from seedlora.evaluation.sandbox import Sandbox

    try:
        Sandbox()
    except ValueError as error:
        yield "bubblewrap", f"no: {error}"
    else:
        yield "bubblewrap", f"works: {shutil.which('bwrap')}"


def _caches() -> Iterable[tuple[str, str]]:
    from huggingface_hub import constants

    from seedlora.utils.wheel_files import cache_folder

    for name, folder in (("seedlora", cache_folder()), ("hub", Path(constants.HF_HUB_CACHE))):
        yield name, _cache(folder)


def _cache(folder: Path) -> str:
    above = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    writable = "writable" if os.access(above, os.W_OK | os.X_OK) else "NOT writable"
    free = f"{shutil.disk_usage(above).free / 2**30:.1f} GiB free there"
    size = _size(folder) if folder.is_dir() else "not there yet"
    return f"{folder}: {size}, {writable}, {free}"


def _size(folder: Path) -> str:
    """Return the size of a folder's files, as far as they can be counted in a moment."""
    total, until = 0, time.monotonic() + _PATIENCE
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:  # removed meanwhile
                continue
        if time.monotonic() > until:
            return f"more than {_written(total)}"
    return _written(total)


def _written(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _hub() -> Iterable[tuple[str, str]]:
    from huggingface_hub import constants, get_session, get_token

    yield "address", _without_login(constants.ENDPOINT)
    yield "token", "there is one" if get_token() else "none; push and gated models need one: hf auth login"
    if constants.HF_HUB_OFFLINE:
        yield "answers", "not asked: HF_HUB_OFFLINE is set"
        return
    start = time.monotonic()
    try:
        status = get_session().head(constants.ENDPOINT, timeout=_PATIENCE).status_code
    except Exception as error:  # of several kinds
        yield "answers", f"no ({type(error).__name__}); what is in the cache, and local folders, can be used"
    else:
        yield "answers", f"yes, {status} after {time.monotonic() - start:.1f} s"


def _without_login(address: str) -> str:
    return re.sub(r"//[^/@]*@", "//", address)


def _extras() -> Iterable[tuple[str, str]]:
    for extra, adds in EXTRAS.items():
        for name, wanted in _requirements(extra):
            found = _version(name)
            state = f"there: {name} {found}" if found else f"missing: pip install '{wanted}'"
            yield extra, f"{state} ({adds})"


def _requirements(extra: str) -> Iterable[tuple[str, str]]:
    """Yield the name of each package of an extra, and what is required of it."""
    for line in metadata.requires("seedlora") or ():
        wanted, _, condition = line.partition(";")
        if f'extra == "{extra}"' in condition.replace("'", '"'):
            name = re.match(r"[\w.-]+", wanted)
            assert name is not None
            yield name[0], wanted.strip()


def _programs() -> Iterable[tuple[str, str]]:
    for name in PROGRAMS:
        yield name, shutil.which(name) or "not among the commands"


def _environment() -> Iterable[tuple[str, str]]:
    for name in VARIABLES:
        if (value := os.environ.get(name)) is not None:
            yield name, _without_login(value)
