"""Every config is complete, says what it is, and takes two steps with a tiny model and ten rows."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import yaml

import datamodules
from callbacks import SeedEnsembleCallback
from seedlora.cli import main
from seedlora.module import SeedLoRAModule
from train import PARTS

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
#: one row with the columns of every data set
ROW = {
    **{"query": "1+1?", "response": "2", "answer": "2 #### 2", "question": "1+1?", "messages": CHAT},
    **{"instruction": "1+1?", "input": "", "output": "2"},
}


def test_there_are_configs():
    assert len(CONFIGS) >= 30


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_takes_two_steps(tiny_llama, tmp_path, monkeypatch, capsys, config):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text((json.dumps(ROW) + "\n") * 10)
    data = ["--data.path", "rows.jsonl"] if config.stem != "default" else ["--data.num_train", "10"]
    small = [*data, "--data.batch_size", "2", "--trainer.accumulate_grad_batches", "1", "--trainer.fast_dev_run", "2"]
    assert main(PARTS, ["--config", str(config), "--model.base_model", tiny_llama, *small]) == 0
    assert "2 steps of 2 rows" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def options_of(kind):
    """The options of a class, and of those that its keyword arguments go on to."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    own = {p.name for p in parameters if p.kind != p.VAR_KEYWORD} - {"self"}
    return own | options_of(kind.__mro__[1]) if any(p.kind == p.VAR_KEYWORD for p in parameters) else own


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_stands_alone(config):
    """No option of ours is left to a default, which may change; the header tells purpose, hardware and command."""
    text = config.read_text(encoding="utf-8")
    written = yaml.safe_load(text)
    data = getattr(datamodules, written["data"]["class_path"].removeprefix("datamodules."))
    assert set(written["model"]) == options_of(SeedLoRAModule)
    assert set(written["ensemble"]) == options_of(SeedEnsembleCallback)
    assert set(written["data"]["init_args"]) == options_of(data)
    assert f"python train.py --config configs/{config.name}" in text
    header = text.partition("trainer:")[0]
    assert "Hardware:" in header
    if config.stem != "default":
        assert "Paper:" in header
        step = written["trainer"]["accumulate_grad_batches"] * written["data"]["init_args"]["batch_size"]
        assert step == (16 if "commonsense" in config.stem or "gsm8k" in config.stem else 128)
        assert "ZeRO-2:   add --trainer.strategy deepspeed_stage_2" in header
        model = written["model"]
        assert ("lora_plus" in config.stem) == (model["lora_plus_ratio"] > 1)
        kinds = {
            "dora": ("dora", "none"),
            "qlora": ("lora", "nf4"),
            "loftq": ("loftq", "nf4"),
            "full": ("none", "none"),
        }
        expected = kinds.get(config.stem.rpartition("_")[2], ("lora", "none"))
        assert (model["adapter"], model["quantization"]) == expected
