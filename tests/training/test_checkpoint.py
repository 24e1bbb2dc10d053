"""``SeedLoRAModule.load_from_checkpoint`` gives the replicas of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from seedlora.callbacks import SeedEnsembleCallback
from seedlora.cli.train import main
from seedlora.training.module import SeedLoRAModule
from tests.helpers.models import ROWS, make_data, make_module
from tests.helpers.training import make_trainer


class Copies(SeedEnsembleCallback):
    """Saves a checkpoint at the end of training, and remembers what the replicas say then."""

    def on_train_epoch_end(self, trainer, module):
        super().on_train_epoch_end(trainer, module)
        trainer.save_checkpoint(self.dirpath / "mine.ckpt")
        self.said = losses(module)


def losses(module):
    module.eval()
    found = {}
    for replica in module.replicas:
        module.stack.route([replica.name])
        with torch.no_grad():
            found[replica.name] = module.token_losses(ROWS, ROWS).losses
    module.train()
    return found


@pytest.mark.parametrize("options", [{}, {"adapter": "dora"}, {"adapter": "pissa"}, {"modules_to_save": ["lm_head"]}])
def test_the_module_is_that_of_the_checkpoint(tiny_llama, tmp_path, options):
    callback = Copies([1, 2], dirpath=tmp_path / "x", budget="full")
    make_trainer(callback, max_epochs=1).fit(make_module(tiny_llama, **options), datamodule=make_data())
    loaded = SeedLoRAModule.load_from_checkpoint(tmp_path / "x" / "mine.ckpt")
    assert loaded.options.adapter == options.get("adapter", "lora")
    found = losses(loaded)
    assert [*found] == ["seed_1", "seed_2"]
    for name, wanted in callback.said.items():
        assert torch.equal(found[name], wanted)


def test_the_loaded_module_is_validated_and_tested(tiny_llama, tmp_path):
    callback = Copies([1, 2], dirpath=tmp_path / "x", budget="full")
    trainer = make_trainer(callback, max_epochs=1)
    trainer.fit(make_module(tiny_llama), datamodule=make_data())
    loaded = SeedLoRAModule.load_from_checkpoint(tmp_path / "x" / "mine.ckpt")
    (alone,) = make_trainer(pl.Callback()).validate(loaded, datamodule=make_data(), verbose=False)
    for seed in (1, 2):
        wanted = trainer.callback_metrics[f"val/loss_seed_{seed}"].item()
        assert alone[f"val/loss_seed_{seed}"] == pytest.approx(wanted, rel=1e-6)
    (scores,) = make_trainer(callback).test(loaded, datamodule=make_data(), verbose=False)
    assert "test/score_fused" in scores


def test_a_checkpoint_of_train_py_is_loaded(tiny_llama, tmp_path):
    options = ["--model.base_model", tiny_llama, "--data.num_train", "24", "--ensemble.seeds", "[1,2]"]
    options += ["--trainer.max_epochs", "2", "--data.num_test", "0"]
    options += ["--trainer.callbacks+=ModelCheckpoint", f"--trainer.callbacks.dirpath={tmp_path}"]
    assert main([*options, "--ensemble.dirpath", str(tmp_path / "x")]) == 0
    (file,) = Path(tmp_path).glob("*.ckpt")
    loaded = SeedLoRAModule.load_from_checkpoint(file)
    assert [replica.name for replica in loaded.replicas] == ["seed_1", "seed_2"]


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is a folder. An adapter's is loaded by peft.AutoPeftModelForCausalLM"):
        SeedLoRAModule.load_from_checkpoint(tmp_path)


def test_a_checkpoint_that_does_not_say_whose_weights_it_holds_is_refused(tiny_llama, tmp_path):
    callback = Copies([1], dirpath=tmp_path / "x")
    make_trainer(callback, max_epochs=1).fit(make_module(tiny_llama), datamodule=make_data())
    file = tmp_path / "x" / "mine.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    del checkpoint["seedlora_replicas"]
    torch.save(checkpoint, file)
    with pytest.raises(ValueError, match="does not say whose weights it holds"):
        SeedLoRAModule.load_from_checkpoint(file)
