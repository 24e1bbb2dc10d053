"""Train one run of the study with the product, and read back its adapters."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from benchmarks.study.design import BATCH, RANK, VALIDATIONS, Task
from seedlora.adapters.reading import read_adapter
from seedlora.callbacks import SeedEnsembleCallback
from seedlora.datamodules import ReasoningGym
from seedlora.merge.inputs import stack_adapters
from seedlora.names import SETTINGS_NAME
from seedlora.training.module import SeedLoRAModule
from seedlora.updates.factors import LoRAFactors


@dataclass(frozen=True)
class Setting:
    """Hold what all cells share.

    Args:
        base_model: a folder, or ``embedded``.
        work: where adapters are kept; 0.3 MB each of the small model, 5 MB of the embedded one.
        accelerator: Lightning's word.
    """

    base_model: str
    work: Path
    accelerator: str = "cpu"


@dataclass(frozen=True)
class Run:
    """One run of the product.

    Args:
        name: of its folder.
        task: what it learns.
        seeds: of the replicas.
        epochs: of each replica.
        rate: learning rate.
        options: of the ensemble callback.
        validates: whether it is validated in training.
    """

    name: str
    task: Task
    seeds: Sequence[int]
    epochs: int
    rate: float
    options: Mapping[str, Any] = field(default_factory=dict)
    validates: bool = True


def steps_of(task: Task, epochs: int) -> int:
    """Return the optimizer steps of a replica."""
    return epochs * math.ceil(task.num_train / BATCH)


def model_and_data(setting: Setting, run: Run) -> tuple[SeedLoRAModule, ReasoningGym]:
    """Return the base model with its adapters' options, and the rows, tokenised."""
    module = SeedLoRAModule(setting.base_model, learning_rate=run.rate, r=RANK, lora_alpha=2 * RANK)
    data = ReasoningGym(batch_size=BATCH, **run.task.data)
    data.tokenizer = module.tokenizer
    data.setup()
    return module, data


def train(setting: Setting, run: Run) -> SeedEnsembleCallback:
    """Train what of a run is not trained yet, controls too, from the last checkpoint if there is one."""
    folder = setting.work / run.name
    ensemble = SeedEnsembleCallback(
        run.seeds,
        dirpath=folder,
        budget="full",
        checkpoint_every_n_steps=200,
        resume=(folder / SETTINGS_NAME).is_file(),
        **{"merge": "soup" if run.validates else "none", **run.options},
    )
    while ensemble.pending or ensemble.pending_controls:
        module, data = model_and_data(setting, run)
        steps = steps_of(run.task, run.epochs)
        trainer = pl.Trainer(
            max_epochs=run.epochs,
            accelerator=setting.accelerator,
            devices=1,
            gradient_clip_val=1.0,
            val_check_interval=max(1, steps // VALIDATIONS),
            check_val_every_n_epoch=None,
            limit_val_batches=1.0 if run.validates else 0,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            use_distributed_sampler=False,
            callbacks=[ensemble],
        )
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.fit(module, datamodule=data, ckpt_path=ensemble.ckpt_path)
    return ensemble


def stack_of(folder: Path, names: Sequence[str]) -> dict[str, LoRAFactors]:
    """Return adapters of a run's folder as one stack, by layer."""
    return stack_adapters({name: read_adapter(folder / name) for name in names})
