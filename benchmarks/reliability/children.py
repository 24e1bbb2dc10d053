"""Run commands of the product in forked processes, which have imported everything already, and may be killed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
#: A command takes no more of a processor's time.
SECONDS = 60.0
#: Nor is it waited for any longer, on a machine that has much else to do.
PATIENCE = 600.0
#: A command that asks for more memory than this is wrong: the models have a thousand weights.
_BYTES = 24 * 2**30


@dataclass(frozen=True)
class Ended:
    """Hold how a command ended: its exit code, or minus the signal that ended it, what it printed, and its CPU time."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def wrong(self) -> str:
        """Return what is wrong with the way that it ended; an empty text if nothing is.

        Right is exit code 0, or one sentence on stderr and the exit code of a refusal, 2, or of a foreseen end, 1.
        """
        if self.seconds > SECONDS:
            return f"took {self.seconds:.0f} s"
        if "Traceback" in self.err + self.out or "not foreseen" in self.err:
            return _end_of(self.err)
        if self.code not in (0, 1, 2):
            return f"exit code {self.code}: {_end_of(self.err)}"
        said = [line for line in self.err.splitlines() if "error:" in line or "stopped" in line]
        if self.code and len(said) != 1:
            return f"{len(said)} sentences with exit code {self.code}: {_end_of(self.err)}"
        return ""

    @property
    def said(self) -> str:
        """Return ``done`` or the sentence."""
        lines = [line for line in self.err.splitlines() if "error:" in line or "stopped" in line]
        return "done" if self.code == 0 else (lines or ["?"])[-1][:300]


def _end_of(text: str) -> str:
    return " | ".join(text.strip().splitlines()[-3:])[-400:]


def run_command(main: Callable[[Sequence[str]], int], words: Sequence[str], *, cwd: Path) -> Ended:
    """Run a command in a process of its own; it is killed when it takes too long."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("out", "err")]
        child = fork(lambda: main(words), *files, cwd=cwd)
        code, seconds = wait_for(child, PATIENCE)
        out, err = (file.read_text(encoding="utf-8", errors="replace") for file in files)
    return Ended(code, out, err, seconds)


def fork(run: Callable[[], int], out: Path, err: Path, *, cwd: Path) -> int:
    """Start a function in a process of its own; return the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setpgid(0, 0)
        os.chdir(cwd)
        tempfile.tempdir = None  # as the environment says now
        resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
        for descriptor, file in ((1, out), (2, err)):
            opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(opened, descriptor)
        sys.stdout, sys.stderr = (os.fdopen(d, "w", encoding="utf-8", errors="replace", closefd=False) for d in (1, 2))
        code = run()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # a traceback is what is looked for
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def wait_for(child: int, seconds: float) -> tuple[int, float]:
    """Wait for the end of a process; it is killed when its time is over.

    Returns:
        The exit code, or minus the signal that ended it, and the seconds that it and those that it started computed.
    """
    until, pause = time.monotonic() + seconds, 0.002
    while time.monotonic() < until:
        found, status, used = os.wait4(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
        time.sleep(pause)
        pause = min(0.05, pause * 1.3)
    kill(child)
    return -signal.SIGKILL, seconds


def kill(child: int) -> None:
    """Kill a process and those that it has started, and wait for its end."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(child, 0)


def cpu_seconds(process: int) -> float:
    """Return the CPU time of a process so far; infinity if it has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("inf")
    return float("inf") if fields[0] == "Z" else (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def children_of(process: int) -> list[int]:
    """Return the processes that a process has started."""
    try:
        return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def in_child(function: Callable[[], T], seconds: float = PATIENCE) -> T:
    """Return what a function gives in a process of its own, so that nothing it changes stays."""
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder) / "result", Path(folder) / "log"

        def run() -> int:
            result.write_bytes(pickle.dumps(function()))
            return 0

        if wait_for(fork(run, log, log, cwd=Path.cwd()), seconds)[0]:
            raise RuntimeError(log.read_text(encoding="utf-8"))
        return pickle.loads(result.read_bytes())


def contents(folder: Path) -> dict[str, str]:
    """Return a hash of every file below a folder, by its name in it; links and folders are named as such."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.is_dir():
            found[str(path.relative_to(folder))] = "folder"
    return found


@contextlib.contextmanager
def own_places(folder: Path) -> Iterator[None]:
    """Let commands keep their cache, their temporary files and their home in a folder."""
    names = {"HOME": "home", "TMPDIR": "tmp", "SEEDLORA_CACHE": "cache"}
    before = {name: os.environ.get(name) for name in names}
    for name, place in names.items():
        (folder / place).mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(folder / place)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
