"""What the ensemble's callback refuses before a step is taken."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest

from seedlora.callbacks import SeedEnsembleCallback
from seedlora.distributed.strategies import choose_strategy
from tests.helpers.models import FULL, SEEDS, make_data, make_module, save_tiny_llama
from tests.helpers.training import SILENT, make_trainer


def test_the_same_start_and_the_same_order_make_no_ensemble(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="vary=.init.*pissa.*start at the same weights"):
        callback = SeedEnsembleCallback(SEEDS, dirpath=tmp_path, vary="init", budget="full")
        trainer = pl.Trainer(max_epochs=1, callbacks=[callback], logger=False, enable_checkpointing=False)
        trainer.fit(make_module(tiny_llama, adapter="pissa"), datamodule=make_data())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"merge": "auto"},
            "merge=.auto. chooses among merges of the seeds' factors, and what adapter=.full. adds",
        ),
        ({"controls": "untrained"}, "controls=.untrained. chooses among"),
        ({"merge": "tsv_m"}, "'tsv_m' works on the factors of adapters.*choose one of seedlora, .*soup"),
        ({"compare": "knots_ties"}, "'knots_ties' works on the factors"),
        ({"vary": "init"}, "with adapter=.full. all seeds start at the same weights"),
    ],
)
def test_what_an_ensemble_of_whole_models_cannot_do_is_refused(tiny_llama, tmp_path, options, message):
    callback = SeedEnsembleCallback(SEEDS, dirpath=tmp_path, budget="full", **options)
    with pytest.raises(ValueError, match=message):
        trainer = pl.Trainer(max_epochs=1, callbacks=[callback], **SILENT)
        trainer.fit(make_module(tiny_llama, **FULL), datamodule=make_data())


def test_a_control_of_another_rank_needs_the_same_start(tiny_llama, tmp_path):
    callback = SeedEnsembleCallback(dirpath=tmp_path / "run", controls="all")
    with pytest.raises(ValueError, match="controls=.all. trains an adapter of another rank.*pissa.*use untrained"):
        callback.check_fit(None, make_module(tiny_llama, adapter="pissa"), None)
    assert not (tmp_path / "run").exists()


def test_what_the_ensemble_needs_is_said(tiny_llama, tmp_path):
    callback = SeedEnsembleCallback(dirpath=tmp_path / "x")
    data = make_data()
    data.tokenizer = make_module(tiny_llama).tokenizer
    data.setup("fit")
    with pytest.raises(ValueError, match=r"got loaders alone; wrap any .*datamodule=StackData\(my_datamodule\)"):
        make_trainer(callback).fit(make_module(tiny_llama), train_dataloaders=data.train_dataloader())
    own = pl.LightningDataModule.from_datasets(train_dataset=[{"prompt": "1+1=", "response": "2"}])
    with pytest.raises(ValueError, match=r"got LightningDataModule; wrap any .*datamodule=StackData\(it\)"):
        make_trainer(callback).fit(make_module(tiny_llama), datamodule=own)
    with pytest.raises(ValueError, match="seeds must be from 0 to"):
        SeedEnsembleCallback([1, -1])
    with pytest.raises(ValueError, match="the run has no end"):
        make_trainer(callback, max_epochs=-1).fit(make_module(tiny_llama), datamodule=make_data())


def test_best_weights_need_validation(tiny_llama, tmp_path):
    callback = SeedEnsembleCallback([1, 2], budget="full", keep="best", dirpath=tmp_path / "x")
    with pytest.raises(ValueError, match="need validation rows"):
        make_trainer(callback, limit_val_batches=0).fit(make_module(tiny_llama), datamodule=make_data())


@pytest.mark.parametrize("strategy", ["deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3", "fsdp2"])
def test_an_optimizer_of_whole_tensors_is_refused_where_they_are_cut(tiny_llama, tmp_path, strategy):
    """Muon makes a matrix orthogonal, which is nothing that its parts can do."""
    callback = SeedEnsembleCallback([1], dirpath=tmp_path / "run")
    chosen = choose_strategy(strategy, accelerator="cpu")
    trainer = pl.Trainer(accelerator="cpu", devices=1, strategy=chosen, max_epochs=1, callbacks=[callback], **SILENT)
    module = make_module(tiny_llama, optimizer="muon")
    with pytest.raises(ValueError, match="optimizer='muon' looks at whole tensors, which DeepSpeed and fsdp2 cut.*ddp"):
        trainer.fit(module, datamodule=make_data())
    assert not (tmp_path / "run").exists()


def test_from_python_too_the_base_has_a_place_for_all_tokens(tiny_llama, tmp_path):
    for option, value, message in (
        ("vocab_size", 100, "makes token .*rows for tokens 0 to 99"),
        ("max_position_embeddings", 9, "a row has .* tokens, the base model only 9 positions"),
    ):
        base = tmp_path / option
        save_tiny_llama(base, seed=0, **{option: value})
        callback = SeedEnsembleCallback(SEEDS, dirpath=tmp_path / "run", budget="full")
        with pytest.raises(ValueError, match=message):
            make_trainer(callback, max_epochs=1).fit(make_module(str(base)), datamodule=make_data())
        assert not (tmp_path / "run").exists()
