"""Every kind of adapter, trained: a stack learns what one replica learns alone, or in a plain PEFT loop."""

from __future__ import annotations

import json

import lightning.pytorch as pl
import pytest
import torch

from seedlora.adapters.reading import read_adapter
from seedlora.callbacks import SeedEnsembleCallback
from seedlora.model.weight_files import WeightFiles
from tests.helpers.models import FAMILIES, KINDS, ROWS, SEEDS, make_data, make_module
from tests.helpers.precision import SAME, relative
from tests.helpers.training import SILENT, plain_peft_run, quantized_lora, saved, train


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("adapter", "quantization"), [*KINDS[1:3], *KINDS[4:6]])
def test_a_replica_equals_a_plain_peft_loop(tiny_llama, tmp_path, adapter, quantization):
    options = {"adapter": adapter, "quantization": quantization, "lora_plus_ratio": 4.0}
    callback = train(tiny_llama, tmp_path, SEEDS[:2], **options)
    ours = saved(callback.adapter_path(42))
    expected = plain_peft_run(
        tiny_llama, 42, epochs=1, accumulate=2, clip=0.05, ratio=4.0, adapt=quantized_lora(adapter, quantization)
    )
    assert set(ours) == set(expected)
    assert {"dora": 1}.get(adapter, 0) == any("magnitude" in key for key in ours)
    for key, tensor in expected.items():
        assert relative(ours[key], tensor) < SAME, key


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("adapter", "quantization"), [*KINDS[1:5], *KINDS[7:]])
def test_a_replica_of_a_stack_equals_its_standalone_run(tiny_llama, tmp_path, adapter, quantization):
    options = {"adapter": adapter, "quantization": quantization, "lora_dropout": 0.1, "max_steps": 3}
    stacked = train(tiny_llama, tmp_path / "stack", SEEDS[:2], **options)
    alone = train(tiny_llama, tmp_path / "alone", SEEDS[1:2], **options)
    expected = saved(alone.adapter_path(42))
    for key, tensor in expected.items():
        assert relative(saved(stacked.adapter_path(42))[key], tensor) < SAME, key
        assert relative(saved(stacked.adapter_path(11))[key], tensor) > 1e-3, key


@pytest.mark.parametrize(("adapter", "quantization"), [("dora", "int8"), ("pissa", "nf4")])
def test_passes_give_the_bits_of_standalone_runs(tiny_llama, tmp_path, adapter, quantization):
    """Also the second pass, on a base that is quantised already and whose starts are known."""
    options = {"adapter": adapter, "quantization": quantization, "lora_dropout": 0.1, "max_steps": 3}
    passes = train(tiny_llama, tmp_path / "passes", SEEDS[:2], stack_size=1, **options)
    alone = train(tiny_llama, tmp_path / "alone", SEEDS[1:2], **options)
    found = saved(passes.adapter_path(42))
    assert all(torch.equal(found[key], tensor) for key, tensor in saved(alone.adapter_path(42)).items())


@pytest.mark.parametrize(
    ("adapter", "quantization", "ratio"),
    [
        ("dora", "nf4", 1.0),
        ("pissa", "none", 1.0),
        ("loftq", "nf4", 1.0),
        ("lora", "int8", 1.0),
        ("rslora", "none", 16.0),
    ],
)
def test_a_run_that_stopped_resumes_to_the_same_bits(tiny_llama, tmp_path, adapter, quantization, ratio):
    options = {"adapter": adapter, "quantization": quantization, "lora_plus_ratio": ratio}
    options |= {"lora_dropout": 0.1, "max_steps": 4}
    whole = train(tiny_llama, tmp_path / "whole", SEEDS[:2], **options)
    with pytest.raises(TimeoutError):
        train(tiny_llama, tmp_path / "stopped", SEEDS[:2], stop=3, **options)
    assert list((tmp_path / "stopped").glob("checkpoints/*/step=3.ckpt"))
    resumed = train(tiny_llama, tmp_path / "stopped", SEEDS[:2], resume=True, **options)
    expected = saved(whole.adapter_path(42))
    assert all(torch.equal(saved(resumed.adapter_path(42))[key], tensor) for key, tensor in expected.items())


@pytest.mark.usefixtures("float64")
def test_dora_is_read_back_scored_and_merged_as_it_acts(tiny_llama, tmp_path):
    callback = SeedEnsembleCallback(SEEDS[:2], dirpath=tmp_path, merge="soup", budget="full")
    module, data = make_module(tiny_llama, adapter="dora"), make_data()
    trainer = pl.Trainer(max_steps=2, callbacks=[callback], accelerator="cpu", num_sanity_val_steps=0, **SILENT)
    trainer.fit(module, datamodule=data)
    assert "val/loss_seed_42" in trainer.callback_metrics
    assert "val/loss_fused" not in trainer.callback_metrics
    trained = {name: tensor.clone() for name, tensor in module.stack.magnitudes("seed_42").items()}
    module.stack.route(["seed_42"])
    expected = module.model(input_ids=ROWS).logits
    for layer in module.stack.layers.values():  # only what was read may be used
        layer.lora_magnitude_vector["seed_42"].weight.data.fill_(7)
    trainer.test(module, datamodule=data, verbose=False)
    assert list(callback.results.scores) == ["base", "seed_11", "seed_42", "soup"]
    module.stack.route(["seed_42"])
    torch.testing.assert_close(module.model(input_ids=ROWS).logits, expected, atol=SAME, rtol=SAME)
    base = WeightFiles(tiny_llama)
    read = read_adapter(tmp_path / "seed_42", base=base).magnitudes
    assert all(torch.equal(magnitude, trained[path]) for path, magnitude in read.items())
    assert read_adapter(tmp_path / "fused").layers.keys() == trained.keys()
    assert json.loads((tmp_path / "fused" / "fusion.json").read_text())["compression"]["relative_error_max"] < 0.5


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_each_family_trains_stacked_as_alone(families, tmp_path, family, adapter):
    options = {"adapter": adapter, "lora_dropout": 0.1, "target_modules": "all-linear"}
    base = str(families / family)
    stacked = train(base, tmp_path / "stack", SEEDS[:2], max_steps=2, **options)
    alone = train(base, tmp_path / "alone", SEEDS[1:2], max_steps=2, **options)
    tensors, expected = (saved(run.adapter_path(42)) for run in (stacked, alone))
    assert max(relative(tensors[key], tensor) for key, tensor in expected.items()) < SAME
    assert all(tensor.norm() > 0 for tensor in expected.values())
