"""Callbacks that interfere with a run: they break weights, stop a seed, end the run, or send SIGTERM."""

from __future__ import annotations

import os
import signal

import lightning.pytorch as pl


class Poison(pl.Callback):
    """Makes one seed's weights infinite before a step."""

    def __init__(self, name, step):
        self.name, self.step = name, step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step and self.name in {replica.name for replica in module.replicas}:
            self.interfere(module)

    def interfere(self, module):
        module.stack.parameters(self.name)[1].data.fill_(float("inf"))


class Break(Poison):
    """Makes one seed's weights infinite just after a step."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        """Not yet."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        super().on_train_batch_start(trainer, module, batch, batch_idx)


class Stop(Poison):
    """Stops one seed before a step, as patience would."""

    def interfere(self, module):
        module.replicas.stop(self.name)


class StopAfter(pl.Callback):
    """Ends the run without warning after a step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            raise TimeoutError


class Fail(pl.Callback):
    """Fails before the sixteenth step."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 15:
            raise RuntimeError("killed")


class Terminate(pl.Callback):
    """Sends SIGTERM to this process at a micro-batch."""

    def __init__(self, batch=5):
        self.batch = batch

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGTERM)
