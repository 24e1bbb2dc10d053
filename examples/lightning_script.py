"""A Lightning script as many projects have one: a DataModule of its own, callbacks, a logger; fit, test and predict.

python examples/lightning_script.py [BASE_MODEL] [FOLDER_OF_THE_RUN]
"""

from __future__ import annotations

import sys
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from own_datamodule import Sums

from seedlora import SeedEnsembleCallback, SeedLoRAModule
from seedlora.datamodules import StackData


def main(base_model: str = "embedded", folder: str = "runs/lightning_script") -> None:
    """Train two seeds for at most three epochs each, score all adapters, and let the advised one answer."""
    run = Path(folder)
    ensemble = SeedEnsembleCallback(seeds=(11, 42), dirpath=run)
    ensemble.predictions.max_new_tokens = 8
    callbacks = [
        ensemble,
        LearningRateMonitor(logging_interval="step"),
        ModelCheckpoint(run / "lightning", monitor="val/loss_fused", filename="best"),
        EarlyStopping("val/loss_fused", patience=5),
    ]
    trainer = pl.Trainer(
        max_epochs=6,  # shared: three for each seed
        callbacks=callbacks,
        logger=CSVLogger(run / "lightning", name="csv", version=""),
        use_distributed_sampler=False,
        log_every_n_steps=1,
    )
    module, data = SeedLoRAModule(base_model, r=4), StackData(Sums(), batch_size=8, style="plain")
    trainer.fit(module, datamodule=data)
    (scores,) = trainer.test(module, datamodule=data)
    print(f"fused: {scores['test/score_fused']:.0%} of the test rows right")  # noqa: T201
    for answers in trainer.predict(module, datamodule=data) or []:
        for answer in answers:
            print(answer["prompt"].strip(), answer["answer"])  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
