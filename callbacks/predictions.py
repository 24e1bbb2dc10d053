"""Answer the test rows by an adapter of the run, in ``Trainer.predict``."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from seedlora.callbacks.scored_batches import load_adapters
from seedlora.names import BASE, PREDICTIONS_NAME
from seedlora.run.ensemble import Ensemble
from seedlora.training.answering import Answer, Answerer
from seedlora.training.module import SeedLoRAModule
from seedlora.utils.files import write_json_lines


class Predictions(pl.Callback):
    """Have ``Trainer.predict`` answer the test rows greedily, and keep the answers in ``predictions.jsonl``.

    Args:
        ensemble: the run.

    Attributes:
        adapter: who answers, by the name of its folder, or ``base``. Default: the adapter that the run advises.
        max_new_tokens: of one answer.
    """

    def __init__(self, ensemble: Ensemble) -> None:
        self._ensemble = ensemble
        self.adapter: str | None = None
        self.max_new_tokens = 512
        self._answers: list[Answer] = []

    def on_predict_start(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """Read the adapter back from its folder.

        Raises:
            ValueError: if it is not there, or cannot be asked here.
        """
        ensemble, self._answers = self._ensemble, []
        if trainer.world_size > 1:
            raise ValueError("Trainer.predict answers in one process; use a Trainer with devices=1")
        if module.options.is_full_finetuning:
            raise ValueError(
                "Trainer.predict asks adapters, and this run trains whole models; use python -m seedlora generate "
                f"{ensemble.fused_path}"
            )
        label = self.adapter or ensemble.advice["folder"] or BASE
        folders = {folder.name: folder for folder in ensemble.folders.values()} | ensemble.folders
        if label != BASE:
            if label not in folders:
                there = ", ".join([BASE, *folders])
                raise ValueError(f"{ensemble.dirpath} has no adapter '{label}' to predict with; it has {there}")
            load_adapters(module.stack, {label: ensemble.read(folders[label])})
        module.answerer = Answerer(
            module.model,
            module.stack,
            module.tokenizer,
            label=label,
            adapter=None if label == BASE else label,
            max_new_tokens=self.max_new_tokens,
        )

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        module: SeedLoRAModule,
        outputs: list[Answer],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the answers to a batch."""
        self._answers += outputs

    def on_predict_end(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """Write the answers, a JSON object a line."""
        module.answerer = None
        if self._ensemble.dirpath.is_dir():
            write_json_lines(self._ensemble.dirpath / PREDICTIONS_NAME, self._answers)
