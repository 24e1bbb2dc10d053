"""Keep what each adapter takes for the answer of each test row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from seedlora.distributed.gathering import gathered
from seedlora.names import SAMPLES_NAME
from seedlora.records.samples import Sample
from seedlora.run.ensemble import Ensemble
from seedlora.training.losses import next_tokens
from seedlora.training.module import SeedLoRAModule
from seedlora.training.scoring import BatchScores
from seedlora.utils.files import write_json_lines


class TestedRows(pl.Callback):
    """Write ``samples.jsonl`` after a test: nothing is generated for it, it is what the scoring has seen.

    Args:
        ensemble: the run.
    """

    def __init__(self, ensemble: Ensemble) -> None:
        self._ensemble = ensemble
        #: Those of this rank by their numbers.
        self._samples: dict[int, Sample] = {}

    def on_test_start(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """Forget an earlier test."""
        self._samples = {}

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        module: SeedLoRAModule,
        outputs: dict[str, Tensor],
        batch: Mapping[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Begin with the rows of a batch, those left out that fill up the shares of the ranks."""
        ids, keep = batch["input_ids"].cpu(), next_tokens(batch["labels"]).keep.cpu()
        for row, item in enumerate(batch["items"].tolist()):
            if item >= 0:
                (at,) = keep[row].nonzero(as_tuple=True)
                prompt, expected = ids[row, : int(at[0]) + 1], ids[row, at + 1]
                self._samples[item] = {
                    "item": item,
                    "prompt": _text(module.tokenizer, prompt),
                    "expected": _text(module.tokenizer, expected),
                    "right": {},
                    "forced": {},
                }
        self.add(module.tokenizer, batch, module.scored.labels, BatchScores(**outputs))

    def add(self, tokenizer: Any, batch: Mapping[str, Tensor], labels: Sequence[str], scores: BatchScores) -> None:
        """Add what adapters take for the answers of test rows; rows that are none are passed by.

        Args:
            tokenizer: of the model.
            batch: of rows.
            labels: of the adapters.
            scores: theirs.
        """
        likely, correct = scores.likely.cpu(), scores.correct.cpu()
        keep = next_tokens(batch["labels"]).keep.cpu()
        for row, item in enumerate(batch["items"].tolist()):
            if (sample := self._samples.get(item)) is not None:
                sample["right"] |= {label: bool(correct[i, row]) for i, label in enumerate(labels)}
                sample["forced"] |= {
                    label: _text(tokenizer, likely[i, row, keep[row]]) for i, label in enumerate(labels)
                }

    def on_test_end(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """Write the rows of all ranks in their order."""
        samples: list[Any] = sorted(gathered([*self._samples.values()]), key=lambda sample: sample["item"])
        if trainer.is_global_zero and not trainer.fast_dev_run:
            write_json_lines(self._ensemble.dirpath / SAMPLES_NAME, samples)


def _text(tokenizer: Any, tokens: Tensor) -> str:
    decoded: str = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    return decoded
