"""A Lightning logger that writes metrics as JSON lines."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from seedlora.utils.files import write_text


class JSONLinesLogger(Logger):
    """Write one line per optimizer step or validation: ``{"step": 10, "train/loss_seed_42": 1.2}``.

    A line is written after the checkpoint of its step, so a crash between the two loses that line and nothing else. A
    run that goes on from a checkpoint first drops the lines of steps that it is going to repeat, see :meth:`rewind`.

    Args:
        path: the file.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)

    @property
    def name(self) -> str:
        """Return the folder's name, which is the run's."""
        return self.path.parent.name

    @property
    def save_dir(self) -> str:
        """Return the folder of the runs."""
        return str(self.path.parent.parent)

    @property
    def version(self) -> str:
        """Return the folder in a run's that Lightning's own callbacks write to, beside ours."""
        return "lightning"

    @property
    def log_dir(self) -> str:
        """Return the folder of the file."""
        return str(self.path.parent)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run's config.yaml holds them."""

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drop the lines from ``step`` on, and what is no line of ours: a crash left one unfinished."""
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] < step:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
        write_text(self.path, "".join(kept))


def metrics_logger(trainer: pl.Trainer, path: Path) -> JSONLinesLogger:
    """Return the logger that writes the metrics of a Trainer's fits into a file, beside the Trainer's own."""
    loggers: list[Logger] = trainer.loggers
    for logger in loggers:
        if isinstance(logger, JSONLinesLogger):
            logger.path = path
            return logger
    metrics = JSONLinesLogger(path)
    trainer.loggers = [*loggers, metrics]
    return metrics
