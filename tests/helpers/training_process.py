"""Runs of train.py as processes, to be killed."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.paths import ROOT

#: A run of a few seconds with dropout, accumulation and a checkpoint at every step.
OPTIONS = [
    *("--model.dtype", "float32", "--model.lora_dropout", "0.1", "--data.batch_size", "2"),
    *("--trainer.accumulate_grad_batches", "2", "--trainer.max_epochs", "6"),
    *("--ensemble.checkpoint_every_n_steps", "1"),
]
#: Forks a process that has imported what takes longer than such a run.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["train", "peft", "transformers.models.llama", "reasoning_gym"])


def start(base_model: str, dirpath: Path, *options: str) -> subprocess.Popen[str]:
    """Start a run; later options override earlier ones."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *_words(base_model, dirpath, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@dataclass
class Forked:
    """A run in a forked process, with what is used here of a Popen."""

    process: Any
    log: Path

    @property
    def returncode(self) -> int | None:
        """Negative for a signal."""
        code: int | None = self.process.exitcode
        return code

    def poll(self) -> int | None:
        """Whether it has ended, and how."""
        return self.returncode

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()

    def wait(self) -> None:
        """For its end."""
        self.process.join()

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait for its end; returns what it printed."""
        self.process.join(timeout)
        return self.log.read_text(), None


def fork(base_model: str, dirpath: Path, *options: str, dying: Callable[[], None] | None = None) -> Forked:
    """As :func:`start`, a run of one process, which begins at once.

    Args:
        base_model: its folder.
        dirpath: of the run.
        options: later ones override earlier ones.
        dying: called in the process first, to have it killed at some point; it is pickled.
    """
    dirpath.parent.mkdir(parents=True, exist_ok=True)
    log = dirpath.with_name(f"{dirpath.name}-{time.monotonic_ns()}.log")
    process = _FORKS.Process(target=_run, args=(_words(base_model, dirpath, options), log, dying))
    process.start()
    return Forked(process, log)


def _words(base_model: str, dirpath: Path, options: tuple[str, ...]) -> list[str]:
    return ["--model.base_model", base_model, *OPTIONS, "--ensemble.dirpath", str(dirpath), *options]


def _run(words: list[str], log: Path, dying: Callable[[], None] | None) -> None:
    with log.open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    from seedlora.cli.train import main

    if dying is not None:
        dying()
    sys.exit(main(words))


def finish(process: subprocess.Popen[str] | Forked) -> str:
    """Wait for its good end; returns what it printed."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def wait_for_step(
    process: subprocess.Popen[str] | Forked, dirpath: Path, step: int, *, of: str = "*", quiet: float = 200.0
) -> float:
    """Return as soon as the checkpoint of a step, or a later one, is there.

    Args:
        process: the run.
        dirpath: its folder.
        step: of the optimizer.
        of: the adapters in training.
        quiet: seconds without a new file or step after which the run is given up. However slow a machine is, one that
            gets on is waited for, as long as pytest's own timeout allows.

    Returns:
        The seconds waited, a measure of how busy the machine is.
    """
    started = last = time.monotonic()
    seen: tuple[int, set[str]] = (0, set())
    while process.poll() is None and time.monotonic() - last < quiet:
        steps = [int(path.stem.removeprefix("step=")) for path in dirpath.glob(f"checkpoints/{of}/step=*.ckpt")]
        found = max(steps, default=0), {path.name for path in dirpath.glob("*")}
        if found[0] >= step:
            return time.monotonic() - started
        if found != seen:
            seen, last = found, time.monotonic()
        time.sleep(0.002)
    code = process.poll()
    process.kill()
    how = f"got no further than step {seen[0]} for {quiet:g} s" if code is None else f"ended with exit code {code}"
    raise AssertionError(f"waiting for step {step}, the run {how}: {process.communicate()[0]}")
