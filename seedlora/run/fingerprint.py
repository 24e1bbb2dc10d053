"""``run.json``: the settings that decide what is learned."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from seedlora.records.settings import SETTINGS, RunSettings
from seedlora.run.budget import ReplicaBudget
from seedlora.run.ensemble_options import INDEPENDENT, EnsembleOptions
from seedlora.run.stack_data import HasRows, StackDataModule

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from seedlora.training.module import SeedLoRAModule


def run_settings(
    options: EnsembleOptions, share: ReplicaBudget, trainer: pl.Trainer, module: SeedLoRAModule, data: StackDataModule
) -> RunSettings:
    """Return what decides a replica's training, as plain data; the seeds and the merge method may change.

    Args:
        options: of the ensemble.
        share: each seed's part of the trainer's epochs or steps.
        trainer: of the fit.
        module: the model to train.
        data: the data module, set up.
    """
    settings = {
        **{f"model.{key}": value for key, value in module.hparams.items()},
        **{f"data.{key}": value for key, value in data.hparams.items()},
        "data": type(data).__name__,
        "ensemble.vary": options.vary,
        "ensemble.keep": options.keep,
        "ensemble.patience": options.patience,
        "ensemble.scheme": options.scheme,
        "ensemble.trunk": options.trunk,
        "ensemble.average_every": options.average_every,
        "ensemble.average_growth": options.average_growth,
        "ensemble.outer_learning_rate": options.outer_learning_rate,
        "ensemble.ema": options.ema,
        "ensemble.ema_part": options.ema_part,
        "ensemble.halving": options.halving,
        "ensemble.halved_rows": options.halved_rows,
        # What a replica of a scheme learns, and whether one is dropped, depends on the others.
        "replicas of the scheme": [r.name for r in options.replicas]
        if options.scheme != INDEPENDENT or options.halving is not None
        else None,
        "first seed": options.seeds[0] if options.vary != "both" else None,
        "epochs per seed": share.epochs,
        "steps per seed": share.steps,
        "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches,
        "trainer.gradient_clip_val": trainer.gradient_clip_val,
        "trainer.gradient_clip_algorithm": trainer.gradient_clip_algorithm,
        "trainer.limit_train_batches": trainer.limit_train_batches,
        "processes": trainer.world_size,
    }
    # The same path may hold other rows by now.
    rows = data.rows if isinstance(data, HasRows) else {}
    settings |= {f"sha256 of the {part} rows": rows[part].sha256() for part in ("train", "val") if part in rows}
    plain: RunSettings = json.loads(json.dumps(settings, default=str))
    return SETTINGS.as_read(plain)
