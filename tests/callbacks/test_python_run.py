"""What a run from Python says and leaves in its folder: what train.py does, without train.py."""

from __future__ import annotations

import json

import lightning.pytorch as pl
import pytest
import yaml
from lightning.pytorch.callbacks import EarlyStopping, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger

from seedlora.callbacks import JSONLinesLogger, SeedEnsembleCallback
from seedlora.cli.errors import UsageError
from seedlora.cli.train import main
from seedlora.cli.train_words import check_config
from seedlora.datamodules import StackData
from seedlora.merge.methods.soup import soup
from seedlora.report.page import write_report
from tests.helpers.models import make_data, make_module
from tests.helpers.training import make_trainer

BUDGET = "The 3 seeds share max_epochs=3: each trains 1 epoch. budget='full' gives each of them all of it.\n"


class Rows(pl.LightningDataModule):
    """Rows of a user's own."""

    def train_dataloader(self):
        return [[{"prompt": f"{i}+1=", "response": str(i + 1)} for i in range(12)]]


def run(base_model, folder, *, data=None, test=True, ensemble=None, **options):
    callback = SeedEnsembleCallback(**{"seeds": [1, 2, 3], "dirpath": folder, **(ensemble or {})})
    trainer = make_trainer(callback, **{"log_every_n_steps": 1, **options})
    module, data = make_module(base_model), data or make_data()
    trainer.fit(module, datamodule=data)
    if test:
        trainer.test(module, datamodule=data)
    return callback


@pytest.fixture(scope="module")
def finished(tiny_llama, tmp_path_factory):
    """A run with a test; not to be edited."""
    return run(tiny_llama, tmp_path_factory.mktemp("python") / "x").dirpath


def test_plan_and_verdict_are_printed(tiny_llama, tmp_path, capsys):
    run(tiny_llama, tmp_path / "x")
    said = capsys.readouterr().out
    for part in ("ReasoningGym: 24 train, 8 val, 12 test", BUDGET, "Use fused:", "report: "):
        assert said.count(part) == 1, part
    assert said.index(BUDGET) < said.index("Use fused:")


def test_what_the_report_finds_out_is_printed_too(tiny_llama, tmp_path, capsys):
    sweep = {"seeds": [1, 2], "budget": "full", "sweep": {"r": [2, 4]}}
    run(tiny_llama, tmp_path / "swept", ensemble=sweep, max_epochs=1)
    said = capsys.readouterr().out
    assert "Validation loss of the sweep" in said
    assert said.count("The best replica of the validation rows is seed_") == 1
    run(tiny_llama, tmp_path / "seeds")
    assert capsys.readouterr().out.count("Train longer, or fuse? ") == 1


def test_another_process_advises_by_the_test_that_there_was(finished):
    again = SeedEnsembleCallback([1, 2, 3], dirpath=finished)
    advice = json.loads((finished / "report.json").read_text())["advice"]
    assert again.ensemble.advice == advice
    assert again.results.scores.keys() >= {"base", "seed_1", "fused"}


def test_nothing_is_printed_of_a_test_that_is_to_be_silent(tiny_llama, tmp_path, capsys):
    callback = SeedEnsembleCallback([1], dirpath=tmp_path / "x")
    trainer, module, data = make_trainer(callback), make_module(tiny_llama), make_data()
    trainer.fit(module, datamodule=data)
    assert "share" not in capsys.readouterr().out  # one seed has it all
    trainer.test(module, datamodule=data, verbose=False)
    assert capsys.readouterr().out == ""
    assert (tmp_path / "x" / "report.html").is_file()


def test_the_folder_holds_what_a_run_of_train_py_holds(finished, tiny_llama, tmp_path):
    options = ["--model.base_model", tiny_llama, "--model.dtype", "float32", "--data.num_train", "24"]
    options += ["--data.num_val", "8", "--data.num_test", "12", "--ensemble.seeds", "[1,2,3]"]
    assert main([*options, "--ensemble.dirpath", str(tmp_path / "y")]) == 0
    assert sorted(path.name for path in finished.iterdir()) == sorted(path.name for path in (tmp_path / "y").iterdir())


def test_the_same_run_starts_from_its_config(finished, tmp_path):
    check_config(finished / "config.yaml")
    assert main(["--config", str(finished / "config.yaml"), "--ensemble.dirpath", str(tmp_path / "again")]) == 0
    for name in ("seed_1", "fused"):
        weights = [folder / name / "adapter_model.safetensors" for folder in (finished, tmp_path / "again")]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def test_train_py_tests_the_run_again(finished, tmp_path, capsys):
    assert main(["test", "--ensemble.dirpath", str(finished)]) == 0
    assert "Use fused:" in capsys.readouterr().out


def test_the_report_has_curves_and_the_command_that_makes_the_run_again(finished):
    report = json.loads((finished / "report.json").read_text())
    assert report["reproduce"]["command"].startswith("python -m seedlora train --config ")
    assert [*report["training"]["train"]] == ["seed_1", "seed_2", "seed_3"]
    assert len((finished / "metrics.jsonl").read_text().splitlines()) >= 12


def test_what_train_py_cannot_start_is_a_record_that_says_why(tiny_llama, tmp_path):
    data = StackData(Rows(), batch_size=2, style="plain")
    callback = run(tiny_llama, tmp_path / "x", data=data, test=False, ensemble={"merge": soup})
    file = callback.dirpath / "config.yaml"
    record = yaml.safe_load(file.read_text())
    why = "StackData holds objects of Python: data; soup is no plain value"
    assert (record["only_from_python"], record["model"]["r"], record["trainer"]["max_epochs"]) == (why, 4, 3)
    with pytest.raises(UsageError, match=f"records a run from Python, which train.py cannot start: {why}"):
        check_config(file)
    report = write_report(callback.dirpath)
    assert report["reproduce"]["command"] is None
    assert any(why in sentence for sentence in report["missing"])


def test_callbacks_and_loggers_are_named_beside_the_options(tiny_llama, tmp_path):
    callback = SeedEnsembleCallback([1], dirpath=tmp_path / "x")
    logger = CSVLogger(tmp_path / "logs")
    trainer = make_trainer(callback, max_epochs=1, logger=logger)
    trainer.callbacks.append(EarlyStopping("val/loss_fused"))
    trainer.fit(make_module(tiny_llama), datamodule=make_data())
    assert "# Not in it: EarlyStopping, CSVLogger.\n" in (tmp_path / "x" / "config.yaml").read_text()
    assert [type(each) for each in trainer.loggers] == [CSVLogger, JSONLinesLogger]


def test_what_lightning_adds_by_itself_is_not_named(tiny_llama, tmp_path):
    callback = SeedEnsembleCallback([1], dirpath=tmp_path / "x")
    added = {"logger": True, "enable_checkpointing": True, "default_root_dir": tmp_path / "logs"}
    trainer = make_trainer(callback, max_epochs=1, **added)
    trainer.fit(make_module(tiny_llama), datamodule=make_data())
    assert "Not in it" not in (tmp_path / "x" / "config.yaml").read_text()


def test_a_fit_that_goes_on_repeats_no_metrics(tiny_llama, tmp_path):
    stopped = SeedEnsembleCallback([1], dirpath=tmp_path / "x", checkpoint_every_n_steps=5)
    options = {"max_epochs": 1, "log_every_n_steps": 1, "limit_val_batches": 0}
    trainer = make_trainer(stopped, **options)
    trainer.callbacks.append(StopHere(8))
    with pytest.raises(KeyError):
        trainer.fit(make_module(tiny_llama), datamodule=make_data())
    again = SeedEnsembleCallback([1], dirpath=tmp_path / "x", checkpoint_every_n_steps=5, resume=True)
    trainer = make_trainer(again, **options)
    trainer.fit(make_module(tiny_llama), datamodule=make_data(), ckpt_path=again.ckpt_path, weights_only=True)
    steps = [json.loads(line)["step"] for line in (tmp_path / "x" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [*range(12)]


class StopHere(pl.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise KeyError


def test_a_trial_run_says_and_writes_nothing(tiny_llama, tmp_path, capsys):
    run(tiny_llama, tmp_path / "x", fast_dev_run=True)
    assert "The run" not in capsys.readouterr().out
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
@pytest.mark.parametrize("limits", [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 15}])
def test_the_bar_counts_to_the_share_of_a_seed(tiny_llama, tmp_path, bar, limits):
    seen = []

    class Watched(bar):
        def on_train_epoch_end(self, trainer, *arguments):
            super().on_train_epoch_end(trainer, *arguments)
            seen.append((trainer.max_epochs, self.total_train_batches, trainer.global_step))

    callback = SeedEnsembleCallback([1, 2, 3], dirpath=tmp_path / "x")
    trainer = make_trainer(callback, **{"enable_progress_bar": True, **limits})
    trainer.callbacks = [each for each in trainer.callbacks if not isinstance(each, pl.callbacks.ProgressBar)]
    trainer.callbacks.append(Watched())
    trainer.fit(make_module(tiny_llama), datamodule=make_data())
    assert seen == [(1, 12, 12)] if "max_steps" not in limits else [(-1, 0, 5)]
    assert (trainer.max_epochs, trainer.max_steps) == (limits["max_epochs"], limits.get("max_steps", -1))


def test_the_trainer_s_limits_are_its_own_again_after_an_error(tiny_llama, tmp_path):
    callback = SeedEnsembleCallback([1, 2, 3], dirpath=tmp_path / "x")
    trainer = make_trainer(callback)
    trainer.callbacks.append(StopHere(2))
    with pytest.raises(KeyError):
        trainer.fit(make_module(tiny_llama), datamodule=make_data())
    assert trainer.max_epochs == 3
