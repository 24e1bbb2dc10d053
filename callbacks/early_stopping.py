"""Keep each seed's best weights, and stop seeds that no longer improve."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from seedlora.run.ensemble import Ensemble
from seedlora.run.ensemble_options import BEST_FUSED
from seedlora.run.fit_state import BestValidation, FitState
from seedlora.training.module import SeedLoRAModule
from seedlora.training.stack_operations import copied, put


class SeedEarlyStopping(pl.Callback):
    """Watch each seed's validation loss: keep the weights of the best, stop the seed that has no patience left.

    A seed keeps what it would alone, whenever the others stop; with ``keep best_fused`` what is watched is the loss of
    the fused adapter, the same for all. Who is stopped or left out is part of a checkpoint.

    Args:
        ensemble: the run.
        state: of the fit, whose best validations are remembered here.
    """

    def __init__(self, ensemble: Ensemble, state: FitState) -> None:
        self._ensemble, self._options, self._state = ensemble, ensemble.options, state
        self._module: SeedLoRAModule | None = None
        self._restored: dict[str, Any] = {}

    def setup(self, trainer: pl.Trainer, module: SeedLoRAModule, stage: str) -> None:
        """Forget the fit before."""
        if stage == "fit":
            self._module, self._restored = module, {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs of the seeds' validations."""
        module, best = self._module, self._state.best
        return {
            "best": {name: {k: v for k, v in vars(row).items() if v is not None} for name, row in best.items()},
            "idle": sorted(() if module is None else module.replicas.idle),
            "left_out": {} if module is None else module.replicas.left_out,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the validations where they were."""
        self._state.best = {name: BestValidation(**row) for name, row in state_dict["best"].items()}
        self._restored = state_dict

    def on_train_start(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """Put back who was stopped in the checkpoint."""
        idle, left_out = self._restored.get("idle", ()), self._restored.get("left_out", {})
        module.replicas.restore(idle=idle, left_out=left_out)

    def on_validation_end(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """Look at the losses of the seeds in training; the fit ends when all are stopped."""
        watches = self._options.watches_validation or self._keeps_best_beside
        if trainer.state.fn != "fit" or trainer.sanity_checking or not watches:
            return
        fused = self._ensemble.live_label if self._options.keep == BEST_FUSED and self._state.control is None else None
        for replica in module.replicas.active:
            if replica.helps:
                continue
            loss = float(trainer.callback_metrics[f"val/loss_{fused or replica.name}"])
            self._watch(module, replica.name, loss, step=trainer.global_step)
        if not module.replicas.active:
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """Put the best weights in the place of the last ones, if they are kept; who was stopped has them already."""
        if trainer.fast_dev_run:
            return
        for replica in module.replicas.active:
            self._take_best(module, replica.name)

    @property
    def _keeps_best_beside(self) -> bool:
        """Return whether the weights of the best validation are written beside the last ones."""
        return self._ensemble.writes_best_beside(self._state.control)

    def _watch(self, module: SeedLoRAModule, name: str, loss: float, *, step: int) -> None:
        """Remember a validation that is the best so far; otherwise stop the seed, if it has no patience left."""
        best = self._state.best.get(name)
        if best is None or best.is_beaten_by(loss):
            keeps = self._options.keeps_best or self._keeps_best_beside
            weights = copied(module.stack.parameters(name)) if keeps else []
            self._state.best[name] = BestValidation(loss, step, weights)
            return
        best.stale += 1
        if self._options.patience is not None and best.stale >= self._options.patience:
            module.replicas.stop(name)
            for other in module.replicas.active:
                if other.helps:
                    module.replicas.stop(other.name)
            best.stopped = step
            self._take_best(module, name)

    def _take_best(self, module: SeedLoRAModule, name: str) -> None:
        """Put a seed's best weights in the place of its last ones, if they are kept."""
        best = self._state.best.get(name)
        if best is not None and best.weights and self._options.keeps_best:
            put(module.stack.parameters(name), best.weights)
