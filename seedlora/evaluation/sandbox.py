"""Run generated programs where they can do no harm.

A program gets a Python process of its own (``python -I``) inside bubblewrap: no network, no file of the host but Python
and the system's libraries, read-only, an empty ``/tmp`` in memory, process ids of its own. It is limited in time,
memory, file size and processes, and killed with everything it started when its time is over.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PASSED, FAILED, TIMED_OUT = "passed", "failed", "timed out"
#: Takes the proof from a pipe, where nobody can read it again, limits itself, runs the program, and gives the proof
#: only if that came to its end. A program that searches the interpreter's own frames could still find it.
_DRIVER = """\
import os, resource, sys
proof = os.read(0, 64)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
path, seconds, memory, files, processes = sys.argv[1:]
for kind, limit in (("CPU", int(seconds) + 1), ("AS", int(memory)), ("FSIZE", int(files)), ("NPROC", int(processes)),
                    ("CORE", 0)):
    try:
        resource.setrlimit(getattr(resource, "RLIMIT_" + kind), (limit, limit))
    except (ValueError, OSError):
        pass
del sys.argv[1:]
with open(path, encoding="utf-8") as file:
    source = file.read()
def run(write=os.write, proof=proof):
    exec(compile(source, "solution.py", "exec"), {"__name__": "solution"})
    write(1, proof)
del proof
run()
"""
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/ld.so.conf.d", "/nix/store")


@dataclass(frozen=True)
class Limits:
    """Limits of what one program may use.

    Args:
        seconds: of wall time.
        memory_mib: of address space.
        file_mib: of one file, its output included.
        processes: at once, threads included.
    """

    seconds: float = 10.0
    memory_mib: int = 4096
    file_mib: int = 16
    processes: int = 64


@dataclass(frozen=True)
class Outcome:
    """The end of a program: ``passed``, ``failed`` or ``timed out``, and the last line of its complaint."""

    status: str
    reason: str = ""


class Sandbox:
    """Runs programs that nobody has read.

    Args:
        limits: of each program.
        bubblewrap: ``False`` accepts the risk of running without it: the limits and the process of its own remain, but
            the program can read and write what you can, and use the network.

    Raises:
        ValueError: if bubblewrap is wanted and is not there, or cannot make a sandbox on this machine.
    """

    def __init__(self, limits: Limits | None = None, *, bubblewrap: bool = True) -> None:
        self.limits = limits or Limits()
        self._prefix = _bubblewrap() if bubblewrap else []
        if (outcome := self.run("assert 1 + 1 == 2")).status != PASSED:
            raise ValueError(
                f"a program that adds 1 and 1 {outcome.status} in the sandbox ({outcome.reason or 'no reason given'}); "
                "bubblewrap needs user namespaces, which some containers forbid"
            )

    def run(self, program: str) -> Outcome:
        """Run a program to its end.

        It passed if its last line was reached: leaving early, by ``sys.exit(0)`` for example, is a failure.
        """
        limits, proof = self.limits, secrets.token_hex(16)
        with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile() as output:
            folder = Path(scratch)
            (folder / "driver.py").write_text(_DRIVER, encoding="utf-8")
            (folder / "program.py").write_text(program, encoding="utf-8", errors="replace")
            inside = "/program" if self._prefix else scratch
            numbers = (int(limits.seconds) + 1, limits.memory_mib << 20, limits.file_mib << 20, limits.processes)
            python = [sys.executable, "-I", f"{inside}/driver.py", f"{inside}/program.py", *map(str, numbers)]
            bind = ["--ro-bind", scratch, "/program", "--"] if self._prefix else []
            process = subprocess.Popen(
                [*self._prefix, *bind, *python],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=None if self._prefix else scratch,
                env={"LANG": "C.UTF-8", "HOME": "/tmp", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},  # noqa: S108
                start_new_session=True,
            )
            assert process.stdin is not None
            with suppress(BrokenPipeError), process.stdin:  # it may have ended already
                process.stdin.write(proof.encode())
            try:
                process.wait(limits.seconds)
                status = FAILED
            except subprocess.TimeoutExpired:
                status = TIMED_OUT
            finally:
                _kill(process)
            output.seek(max(0, output.seek(0, os.SEEK_END) - 4096))
            said = output.read().decode("utf-8", errors="replace")
        if status == FAILED and process.returncode == 0 and proof in said:
            return Outcome(PASSED)
        lines = [line for line in said.replace(proof, "").splitlines() if line.strip()]
        return Outcome(status, lines[-1][:200] if lines and status == FAILED else "")

    def run_all(
        self, programs: Sequence[str], *, workers: int | None = None, on_done: Callable[[], object] | None = None
    ) -> list[Outcome]:
        """Run many programs, ``workers`` at once (default: the processor cores), in order."""

        def one(program: str) -> Outcome:
            outcome = self.run(program)
            if on_done is not None:
                on_done()
            return outcome

        with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
            return list(pool.map(one, programs))


def _bubblewrap() -> list[str]:
    if (bwrap := shutil.which("bwrap")) is None:
        raise ValueError(
            "generated code runs only inside bubblewrap, and there is no 'bwrap' here; install the package bubblewrap, "
            "or score the written samples elsewhere, or accept the risk: python -m seedlora evaluate --without_sandbox"
        )
    command = [bwrap, "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    command += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]  # noqa: S108 - a new, empty one
    for path in dict.fromkeys((*_SYSTEM, sys.base_prefix, sys.prefix, str(Path(sys.executable).resolve().parent))):
        command += ["--ro-bind-try", path, path]
    return [*command, "--chdir", "/tmp"]  # noqa: S108


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the whole session; what is left in a sandbox of its own ends with its first process."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
