"""Train a stack on rows from a LightningDataModule of your own.

`StackData` takes any LightningDataModule whose loaders give rows, as here, or batches of tokens as transformers takes
them. It decides the order of the rows for each seed; everything else of your data module stays as it is.

    python examples/own_datamodule.py [BASE_MODEL] [FOLDER_OF_THE_RUN]
"""

from __future__ import annotations

import sys

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from seedlora import SeedEnsembleCallback, SeedLoRAModule
from seedlora.datamodules import StackData


class Sums(pl.LightningDataModule):
    """Sums of two numbers, as somebody's project has them."""

    def setup(self, stage: str) -> None:  # noqa: ARG002 - the same rows for all stages
        """Make the rows."""
        self.sums = [{"prompt": f"{a}+{b}=", "response": str(a + b)} for a in range(10) for b in range(10)]

    def train_dataloader(self) -> DataLoader[dict[str, str]]:
        """Return 80 rows."""
        return DataLoader(self.sums[:80], batch_size=4, shuffle=True)

    def val_dataloader(self) -> DataLoader[dict[str, str]]:
        """Return ten others."""
        return DataLoader(self.sums[80:90], batch_size=4)

    def test_dataloader(self) -> DataLoader[dict[str, str]]:
        """Return the last ten."""
        return DataLoader(self.sums[90:], batch_size=4)


def main(base_model: str = "embedded", folder: str = "runs/own_datamodule") -> None:
    """Train two seeds of an adapter, merge them, and score all on the test rows."""
    data = StackData(Sums(), batch_size=8, style="plain")
    module = SeedLoRAModule(base_model, r=4)
    ensemble = SeedEnsembleCallback(seeds=(11, 42), dirpath=folder)
    trainer = pl.Trainer(max_epochs=2, callbacks=[ensemble], use_distributed_sampler=False)
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data)


if __name__ == "__main__":
    main(*sys.argv[1:])
