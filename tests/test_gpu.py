"""The same code on a CUDA device; left out where there is none."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from conftest import built, make_data, make_module, replicas
from safetensors.torch import load_file

from callbacks import SeedEnsembleCallback
from seedlora.plan import PeakMemory

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def fit(base_model, dirpath, seeds, accelerator="gpu", **options):
    ensemble = SeedEnsembleCallback(seeds, budget="full", dirpath=dirpath)
    run = pl.Trainer(
        max_epochs=1,
        accelerator=accelerator,
        devices=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[ensemble],
    )
    module, data = make_module(base_model, **options), make_data()
    run.fit(module, datamodule=data)
    run.test(module, datamodule=data, verbose=False)
    return ensemble


def weights(ensemble, name):
    return load_file(ensemble.dirpath / name / "adapter_model.safetensors")


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_replica_of_a_stack_is_its_standalone_run(tiny_llama, tmp_path, dropout):
    stack = fit(tiny_llama, tmp_path / "stack", [1, 2, 3], lora_dropout=dropout)
    alone = fit(tiny_llama, tmp_path / "alone", [2], lora_dropout=dropout)
    wanted = weights(alone, "seed_2")
    found = weights(stack, "seed_2")
    assert all(torch.allclose(found[key], wanted[key], rtol=0, atol=1e-5) for key in wanted)


def test_the_device_changes_nothing_but_rounding(tiny_llama, tmp_path):
    gpu = fit(tiny_llama, tmp_path / "gpu", [1, 2])
    cpu = fit(tiny_llama, tmp_path / "cpu", [1, 2], accelerator="cpu")
    wanted, found = weights(cpu, "fused"), weights(gpu, "fused")
    assert all(torch.allclose(found[key], wanted[key], rtol=0, atol=1e-3) for key in wanted)
    assert gpu.results.scores["fused"].n == 12


def test_seeds_in_passes_are_fused_live_with_those_on_disk(tiny_llama, tmp_path):
    ensemble = SeedEnsembleCallback([1, 2], budget="full", stack_size=1, dirpath=tmp_path / "x")
    module, data = make_module(tiny_llama), make_data()
    for _ in ensemble.seeds:
        run = pl.Trainer(
            max_epochs=1, accelerator="gpu", devices=1, logger=False, enable_checkpointing=False, callbacks=[ensemble]
        )
        run.fit(module, datamodule=data)
        assert "val/loss_fused" in run.callback_metrics
    together = fit(tiny_llama, tmp_path / "together", [1, 2])
    wanted, found = weights(together, "fused"), weights(ensemble, "fused")
    assert all(torch.allclose(found[key], wanted[key], rtol=0, atol=1e-4) for key in wanted)


def test_the_same_seed_gives_the_same_bits(tiny_llama, tmp_path):
    first, second = (fit(tiny_llama, tmp_path / name, [1, 2], dtype="bfloat16") for name in ("a", "b"))
    for key, value in weights(first, "fused").items():
        assert torch.equal(weights(second, "fused")[key], value)


def test_rows_of_a_stack_see_their_own_adapter(tiny_llama):
    module = built(tiny_llama, 1, 2, dtype="bfloat16").cuda()
    assert module.replicas == replicas(1, 2)
    ids = torch.randint(0, 257, (2, 9), device="cuda")
    with torch.no_grad():
        module.stack.route(["seed_1", "seed_2"])
        together = module.model(input_ids=ids).logits
        for i, name in enumerate(("seed_1", "seed_2")):
            module.stack.route([name])
            assert torch.allclose(module.model(input_ids=ids[i : i + 1]).logits[0], together[i], atol=2e-2)


def test_peak_memory_is_the_device_s():
    peak = PeakMemory(torch.device("cuda"))
    block = torch.empty(2**24, dtype=torch.uint8, device="cuda")
    del block
    assert 2**24 <= peak.bytes < 2**26
