"""Callbacks and loggers of Lightning's beside the ensemble in a Trainer of the user's own."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger

from seedlora.callbacks import SeedEnsembleCallback
from seedlora.training.module import SeedLoRAModule
from tests.helpers.models import make_data, make_module
from tests.helpers.training import make_trainer


def fit(base_model, folder, *, callback=None, test=False, **options):
    ensemble = SeedEnsembleCallback([1, 2], dirpath=folder / "x", budget="full")
    trainer = make_trainer(ensemble, **{"max_epochs": 1, "log_every_n_steps": 1, **options})
    trainer.callbacks += [] if callback is None else [callback]
    module, data = make_module(base_model), make_data()
    trainer.fit(module, datamodule=data)
    if test:
        trainer.test(module, datamodule=data, verbose=False)
    return trainer


def test_learning_rate_monitor(tiny_llama, tmp_path):
    fit(tiny_llama, tmp_path, callback=LearningRateMonitor("step"), logger=CSVLogger(tmp_path, name="csv", version=""))
    lines = map(json.loads, (tmp_path / "x" / "metrics.jsonl").read_text().splitlines())
    rates = [line["lr-AdamW"] for line in lines if "lr-AdamW" in line]
    assert len(rates) == 12
    assert max(rates) == pytest.approx(2e-3)
    assert rates[-1] < 1e-4


def test_model_checkpoint(tiny_llama, tmp_path):
    best = ModelCheckpoint(tmp_path / "best", monitor="val/loss_fused")
    trainer = fit(tiny_llama, tmp_path, callback=best, val_check_interval=0.25, enable_checkpointing=True)
    assert best.best_model_score == pytest.approx(trainer.callback_metrics["val/loss_fused"].item(), rel=0.05)
    loaded = SeedLoRAModule.load_from_checkpoint(best.best_model_path)
    assert [replica.name for replica in loaded.replicas] == ["seed_1", "seed_2"]


def test_early_stopping(tiny_llama, tmp_path):
    """No loss is ever so much better: it stops at the second validation."""
    stopping = EarlyStopping("val/loss_fused", min_delta=100.0, patience=1)
    trainer = fit(tiny_llama, tmp_path, callback=stopping, val_check_interval=0.25, max_epochs=3)
    assert trainer.global_step == 6
    row = json.loads((tmp_path / "x" / "trained.json").read_text())["seed_1"]
    assert (row["steps"], row["planned"], row["ended_by"]) == (6, 36, "EarlyStopping on val/loss_fused")
    assert (tmp_path / "x" / "fused").is_dir()


def test_csv_logger(tiny_llama, tmp_path):
    fit(tiny_llama, tmp_path, logger=CSVLogger(tmp_path, name="csv", version=""), test=True)
    head = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/loss_seed_1", "val/loss_fused", "test/score_soup"} <= {*head}


#: What makes each logger in a folder, and the package that it needs.
LOGGERS = {
    "tensorboard": (lambda folder: TensorBoardLogger(folder), "tensorboard"),
    "wandb": (lambda folder: WandbLogger(save_dir=folder, mode="offline", project="seedlora"), "wandb"),
    "mlflow": (lambda folder: MLFlowLogger(tracking_uri=f"file:{folder}/mlruns"), "mlflow"),
}


@pytest.mark.parametrize("name", LOGGERS)
def test_a_logger_gets_losses_and_scores_or_names_its_package(tiny_llama, tmp_path, monkeypatch, name):
    make, package = LOGGERS[name]
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("WANDB_SILENT", "true")
    if find_spec(package) is None:
        with pytest.raises(ModuleNotFoundError, match=package):
            make(tmp_path / "logs")
        return
    logger, seen = make(tmp_path / "logs"), set()
    log = logger.log_metrics

    def watched(metrics, step=None):
        seen.update(metrics)
        return log(metrics, step=step)

    monkeypatch.setattr(logger, "log_metrics", watched)
    fit(tiny_llama, tmp_path, logger=logger, test=True)
    logger.finalize("success")
    assert {"train/loss_seed_1", "val/loss_fused", "test/score_soup"} <= seen
    assert any(path.is_file() for path in (tmp_path / "logs").rglob("*"))
