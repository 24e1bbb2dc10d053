"""End all processes of a run when one ends."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence

import lightning.pytorch as pl
import torch

from seedlora.distributed.lightning_internals import started_processes


class ProcessWatch:
    """Stops this process when another one of the run is gone, even where it waits for that one.

    A process that waits in a collective may wait for the rest of the process group's timeout, half an hour by default;
    Lightning's own observer, every five seconds, ends the first process without a word. This one looks often enough to
    be first: the first process of a machine at those that Lightning's launcher started, the others at the
    process that started them. Processes of another machine are not seen; there the connection or the timeout tells.

    Args:
        trainer: whose launcher starts the processes.
        on_lost: called once, with what happened, before the process exits with code 1.
    """

    def __init__(self, trainer: pl.Trainer, on_lost: Callable[[str], None]) -> None:
        self._trainer, self._on_lost, self._parent = trainer, on_lost, os.getppid()

    def start(self) -> None:
        """Start to look at the other processes, in a thread that ends with the main thread."""
        threading.Thread(target=self._watch, name="process-watch", daemon=True).start()

    def finish(self) -> None:
        """Wait at the end of the run, so that the first process outlives the others: they would find it gone."""
        for process in self._processes:
            process.wait()

    def _watch(self) -> None:
        while not (lost := self._lost()):
            time.sleep(0.02)
        self._on_lost(lost)
        for process in self._processes:
            process.kill()
        os._exit(1)

    @property
    def _processes(self) -> Sequence[subprocess.Popen[bytes]]:
        return started_processes(self._trainer.strategy)

    def _lost(self) -> str | None:
        if self._trainer.global_rank and os.getppid() != self._parent:
            return "the process that started this one is gone"
        for rank, process in enumerate(self._processes, start=1):
            if code := process.poll():
                how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
                return f"process {rank} of {len(self._processes) + 1} {how}"
        return None


def is_lost_connection(error: BaseException) -> bool:
    """Return whether an error says that the other processes cannot be reached, as when one of them ended."""
    return isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)
