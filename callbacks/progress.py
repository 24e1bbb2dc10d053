"""The progress bar of an ensemble."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.progress import BarColumn

#: Columns of a terminal that description, batches, times and speed take beside bar and metrics.
_BESIDE = 45
#: Width of the bar, and in a terminal of fewer than so many columns.
_BAR, _SHORT_BAR, _NARROW = 40, 10, 140


class EnsembleProgressBar(RichProgressBar):
    """Show Lightning's rich bar with the losses of the seeds under short names.

    Where there is no terminal, it prints a line after each validation instead.
    """

    def __init__(self) -> None:
        super().__init__(refresh_rate=1)
        self._lines = Console(soft_wrap=True)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Return training and fused validation losses, and the speed: the seeds' validation losses are in the log."""
        shown = super().get_metrics(trainer, pl_module)
        shown.pop("v_num", None)
        speed = shown.pop("speed/tokens_per_s", None)
        short = {name.removeprefix("train/loss_").removeprefix("speed/"): value for name, value in shown.items()}
        if (fused := trainer.callback_metrics.get("val/loss_fused")) is not None:
            short["val fused"] = fused.item()
        if speed is not None:
            short["tok/s"] = f"{float(speed):,.0f}"
        return self._fitting(short)

    @property
    def _bar_width(self) -> int:
        return _SHORT_BAR if self._lines.width < _NARROW else _BAR

    def _fitting(self, shown: dict[str, Any]) -> dict[str, Any]:
        """Return the metrics that stand in one line: where not all do, one training loss, the mean, and no speed."""
        room = self._lines.width - _BESIDE - self._bar_width
        texts = (f"{name}: {value if isinstance(value, str) else '0.000'} " for name, value in shown.items())
        if sum(map(len, texts)) <= room:
            return shown
        losses = [value for name, value in shown.items() if name not in ("val fused", "tok/s")]
        mean = {"loss": sum(losses) / len(losses)} if losses else {}
        return mean | {name: value for name, value in shown.items() if name == "val fused"}

    def configure_columns(self, trainer: pl.Trainer) -> list[Any]:
        """Return Lightning's columns, with a short bar in a narrow terminal."""
        columns = super().configure_columns(trainer)
        for column in columns:
            if isinstance(column, BarColumn):
                column.bar_width = self._bar_width
        return columns

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print a line where no bar can be seen."""
        super().on_validation_end(trainer, pl_module)
        if (
            self.is_enabled
            and not self._lines.is_terminal
            and trainer.state.fn == "fit"
            and not trainer.sanity_checking
        ):
            losses = {
                name.removeprefix("val/loss_"): value.item()
                for name, value in trainer.callback_metrics.items()
                if name.startswith("val/loss_")
            }
            if losses:
                text = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
                self._lines.print(f"step {trainer.global_step}: validation loss {text}", highlight=False)

    def _get_train_description(self, current_epoch: int) -> str:
        return f"Epoch {current_epoch + 1}"
