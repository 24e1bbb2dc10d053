"""Every config is complete, says what it is, and takes two steps with a tiny model and ten rows."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
import yaml

from benchmarks import estimate
from seedlora import datamodules
from seedlora.callbacks import SeedEnsembleCallback
from seedlora.cli.train import main
from seedlora.training.module import SeedLoRAModule
from tests.helpers.paths import ROOT

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
def test_every_config_takes_two_steps_and_an_override(tiny_llama, tmp_path, monkeypatch, capsys, config):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text((json.dumps(ROW) + "\n") * 10)
    data = ["--data.path", "rows.jsonl"] if config.stem != "default" else ["--data.num_train", "10"]
    small = [*data, "--data.batch_size", "2", "--trainer.accumulate_grad_batches", "1", "--trainer.fast_dev_run", "2"]
    other = ["--ensemble.seeds", "[5,6,7]"]
    assert main(["--config", str(config), "--model.base_model", tiny_llama, *small, *other]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "2 steps of 2 rows" in shown
    assert "seeds 5, 6, 7 in " in shown


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
    data = getattr(datamodules, written["data"]["class_path"].removeprefix("seedlora.datamodules."))
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
        eight = re.search(r"8 GPUs:   add --trainer.devices 8( --\S+ \d+)+", header)
        assert eight
        given = dict(re.findall(r"--(?:trainer|data)\.(accumulate_grad_batches|batch_size) (\d+)", eight[0]))
        micro, rows = (
            int(given.get(name, default))
            for name, default in (
                ("accumulate_grad_batches", written["trainer"]["accumulate_grad_batches"]),
                ("batch_size", written["data"]["init_args"]["batch_size"]),
            )
        )
        assert 8 * micro * rows == step
        model = written["model"]
        table = "the paper's Table 5" in header and model["warmup_steps"]
        assert (f"a warm-up ratio of 0.03 where that table has {table} steps" in header) == bool(table)
        assert ("lora_plus" in config.stem) == (model["lora_plus_ratio"] > 1)
        kinds = {
            "dora": ("dora", "none"),
            "qlora": ("lora", "nf4"),
            "loftq": ("loftq", "nf4"),
            "full": ("full", "none"),
        }
        expected = kinds.get(config.stem.rpartition("_")[2], ("lora", "none"))
        assert (model["adapter"], model["quantization"]) == expected


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return tmp_path_factory.mktemp("shapes")


@pytest.mark.parametrize("config", [path for path in CONFIGS if path.stem != "default"], ids=lambda path: path.stem)
def test_the_header_tells_time_and_memory_as_estimated(shapes, config):
    """``python benchmarks/estimate.py --configs`` prints what belongs there."""
    header, _, _ = config.read_text(encoding="utf-8").partition("trainer:")
    text = " ".join(header.replace("#", " ").split())
    hours, tokens, memory = re.search(
        r"([\d.]+) h on (?:an H100|H100s) at 40 % .* \(([\d,]+) M tokens\), (\d+) GiB (?:on each )?with", text
    ).groups()
    expected = estimate.of_config(yaml.safe_load(config.read_text(encoding="utf-8")), shapes)
    assert float(hours) == pytest.approx(expected.hours, rel=0.1)
    assert float(tokens.replace(",", "")) * 1e6 == pytest.approx(expected.tokens, rel=0.1)
    assert float(memory) == pytest.approx(expected.memory, rel=0.1)


def test_the_table_of_the_docs_is_what_the_functions_give(shapes):
    assert estimate.table(shapes) in (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")


def test_the_estimate_by_hand(shapes):
    """7B by numbers written out: three seeds of one epoch, and its weights among eight."""
    config = yaml.safe_load((ROOT / "configs" / f"{estimate.TABLE_OF}.yaml").read_text(encoding="utf-8"))
    layers = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    adapter = 32 * 8 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    tokens = 3 * 102.7e6
    operations = tokens * (6 * layers + 8 * adapter) + 0.6 * tokens * 4 * 32000 * 4096
    one = estimate.estimate(config, shapes, gradient_checkpointing="full")
    assert one.hours == pytest.approx(operations / (0.4 * 989e12) / 3600, rel=1e-6)
    weights = layers + 2 * 32000 * 4096 + 65 * 4096
    layer = 2 * (6 * 4096 + 4 * 11008 + 3 * 7 * 8) + 8 * 4096
    passing = 2 * (2 * 4096 + 2 * 11008)
    ends = 2 * 2 * 4096 + 4 * 4096
    activations = 3 * 8 * 512 * (32 * 2 * 4096 + layer + passing + ends)
    few = 2 * (14747 // 2 * 4096 * 2)
    assert one.memory == pytest.approx((2 * weights + 3 * 16 * adapter + activations + few) / 2**30, rel=0.01)
    eight = estimate.estimate(config, shapes, shared=estimate.Sharding(3, 8), gradient_checkpointing="full")
    assert eight.hours == pytest.approx(one.hours / 8)
    assert 2 < one.memory - eight.memory < 2 * weights / 2**30
