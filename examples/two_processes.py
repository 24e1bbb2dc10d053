"""Two processes that share each step's rows, started by the script itself: Lightning runs it once more for the second.

    python examples/two_processes.py [BASE_MODEL] [FOLDER_OF_THE_RUN]

On a machine with GPUs leave `accelerator` out and give their number as `devices`.
"""

from __future__ import annotations

import sys

import lightning.pytorch as pl

from seedlora import SeedEnsembleCallback, SeedLoRAModule
from seedlora.datamodules import ReasoningGym


def main(base_model: str = "embedded", folder: str = "runs/two_processes") -> None:
    """Train two seeds of an adapter, each process on half of the rows, and score all on the test rows."""
    ensemble = SeedEnsembleCallback(seeds=(11, 42), dirpath=folder)
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        callbacks=[ensemble],
        use_distributed_sampler=False,  # the data module deals the rows itself
    )
    module = SeedLoRAModule(base_model, r=4)
    data = ReasoningGym(num_train=32, num_val=8, num_test=10, batch_size=4)
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data)


if __name__ == "__main__":
    main(*sys.argv[1:])
