"""Answer SIGTERM, as a preempted job gets it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl

from seedlora.run.fit_state import FitState
from seedlora.training.module import SeedLoRAModule
from seedlora.training.replicas import StoppedError

_TERMINATED = "terminated by SIGTERM after training; the adapters are written"


class Termination(pl.Callback):
    """Answer SIGTERM in Lightning's place: in training it is noted, afterwards it ends the run at once.

    Lightning would leave in the middle of an optimizer step, where no checkpoint can be taken. Choosing and merging may
    take longer than a job is given to end. :class:`TerminationEnd` gives the signal back.

    Args:
        state: of the fit, where a SIGTERM is noted.
    """

    def __init__(self, state: FitState) -> None:
        self._state = state
        self._before: Any = None

    def on_train_start(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """Note a SIGTERM from now on: the checkpoint that it asks for is taken after the step at hand."""
        self._state.terminated = False
        self._answer_by(self._note)

    def on_train_end(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """End the run if a SIGTERM came too late for a checkpoint; one that comes from now on ends it at once.

        Raises:
            StoppedError: if it came.
        """
        if trainer.fast_dev_run:
            return
        self._answer_by(_leave)
        if trainer.strategy.reduce_boolean_decision(self._state.terminated, all=False):
            raise StoppedError(_TERMINATED)

    def on_validation_start(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """End the run at once after a SIGTERM, where this validation is not part of training."""
        if trainer.state.fn == "validate":
            self._answer_by(_leave)

    def on_test_start(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """End the run at once after a SIGTERM."""
        self._answer_by(_leave)

    @contextmanager
    def leaving_at_once(self) -> Iterator[None]:
        """End the run at once after a SIGTERM inside."""
        self._answer_by(_leave)
        try:
            yield
        finally:
            self.give_back()

    def give_back(self) -> None:
        """Let whoever answered SIGTERM before answer it again."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _answer_by(self, handler: Callable[[int, Any], None]) -> None:
        if threading.current_thread() is threading.main_thread():
            before = signal.signal(signal.SIGTERM, handler)
            self._before = before if self._before is None else self._before

    def _note(self, *_: object) -> None:
        self._state.terminated = True


class TerminationEnd(pl.Callback):
    """Give SIGTERM back on every way out, as the last part: Lightning, which had it before, gives it back itself later.

    Args:
        termination: who answers it.
    """

    def __init__(self, termination: Termination) -> None:
        self._termination = termination

    def on_train_end(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """Give it back before the end of the fit, where Lightning does."""
        self._termination.give_back()

    def on_validation_end(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """Give it back if this validation was not part of training."""
        if trainer.state.fn == "validate":
            self._termination.give_back()

    def on_test_end(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """Give it back."""
        self._termination.give_back()

    def on_exception(self, trainer: pl.Trainer, module: SeedLoRAModule, exception: BaseException) -> None:
        """Give it back."""
        self._termination.give_back()


def _leave(*_: object) -> None:
    """Raise no error of the kinds that are caught on the way, as a file that cannot be read would be."""
    raise SystemExit(_TERMINATED)
