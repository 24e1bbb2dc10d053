"""Keep what each adapter takes for the answer of each test row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from seedlora.distributed.gathering import gathered
from seedlora.names import SAMPLES_NAME
from seedlora.records.samples import Sample
from seedlora.run.ensemble import Ensemble
from seedlora.training.losses import next_tokens
from seedlora.training.module import SeedLoRAModule
from seedlora.utils.files import write_json_lines


class TestedRows(pl.Callback):
    """Write ``samples.jsonl`` after a test: nothing is generated for it, it is what the test's own pass has seen.

    Args:
        ensemble: the run.
    """

    def __init__(self, ensemble: Ensemble) -> None:
        self._ensemble = ensemble
        self._samples: list[Sample] = []

    def on_test_start(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """Forget an earlier test."""
        self._samples = []

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        module: SeedLoRAModule,
        outputs: Mapping[str, Tensor],
        batch: Mapping[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the rows of a batch, those left out that fill up the shares of the ranks."""
        ids, likely, correct = (each.cpu() for each in (batch["input_ids"], outputs["likely"], outputs["correct"]))
        keep, labels = next_tokens(batch["labels"]).keep.cpu(), module.scored.labels

        def text(tokens: Tensor) -> str:
            decoded: str = module.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
            return decoded

        for row, item in enumerate(batch["items"].tolist()):
            if item < 0:
                continue
            (at,) = keep[row].nonzero(as_tuple=True)
            self._samples.append(
                {
                    "item": item,
                    "prompt": text(ids[row, : int(at[0]) + 1]),
                    "expected": text(ids[row, at + 1]),
                    "right": {label: bool(correct[i, row]) for i, label in enumerate(labels)},
                    "forced": {label: text(likely[i, row, at]) for i, label in enumerate(labels)},
                }
            )

    def on_test_end(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """Write the rows of all ranks in their order; a run of whole models tests the base alone in this pass."""
        samples: list[Any] = sorted(gathered(self._samples), key=lambda sample: sample["item"])
        if trainer.is_global_zero and not trainer.fast_dev_run and not module.options.is_full_finetuning:
            write_json_lines(self._ensemble.dirpath / SAMPLES_NAME, samples)
