"""A module whose validation losses are told, to see who is stopped and which weights are kept."""

from __future__ import annotations

import lightning.pytorch as pl
from safetensors.torch import load_file

from seedlora.training.module import SeedLoRAModule
from tests.helpers.models import make_data
from tests.helpers.training import make_trainer


class Scripted(SeedLoRAModule):
    """Validation losses as told, the last one again and again; keeps the weights that were there at each validation."""

    losses: dict[str, list[float]]

    def on_validation_start(self):
        self.weights.append(
            {r.name: [p.detach().clone() for p in self.stack.parameters(r.name)] for r in self.replicas}
        )

    def validation_step(self, batch, batch_idx):
        for name, values in self.losses.items():
            self.log(f"val/loss_{name}", values[min(len(self.weights), len(values)) - 1])


def fit_scripted(base, callback, losses, **options):
    """Fit with a validation every quarter of an epoch, whose losses are told; return the module and the Trainer."""
    module = Scripted(base, dtype="float32", r=4)
    module.losses, module.weights = losses, []
    run = make_trainer(callback, **{"max_epochs": 3, "val_check_interval": 0.25, "num_sanity_val_steps": 0, **options})
    run.fit(module, datamodule=make_data())
    return module, run


def written(callback, seed):
    """Read the tensors that were written for a seed."""
    return load_file(callback.adapter_path(seed) / "adapter_model.safetensors")


def holds(tensors, weights):
    """Say whether a file holds these weights, in whatever order."""
    sums = [sorted(t.double().sum().item() for t in these) for these in (tensors.values(), weights)]
    return sums[0] == sums[1]


class Validations(list, pl.Callback):
    """The optimizer steps at which validations ended."""

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.append(trainer.global_step)
