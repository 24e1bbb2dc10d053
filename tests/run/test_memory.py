"""The estimate of memory against numbers counted by hand."""

from __future__ import annotations

import json
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch

from seedlora.distributed.strategies import FSDP2Strategy, Sharding
from seedlora.run.memory import Memory, device_memory, fitting_stack, memory_of, step_memory, trainable_parameters
from seedlora.run.operations import work
from tests.helpers.full_modules import ENDS
from tests.helpers.models import FULL, built, make_data, make_module
from tests.helpers.paths import ROOT
from tests.helpers.precision import plain_model
from tests.helpers.strategies_job import zero

# The tiny Llama: per layer q 32 x 32, k and v 16 x 32, o 32 x 32, and 3 x 48 x 32; two layers
LAYER = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 48 * 32
OUTSIDE = 2 * 257 * 32 + 5 * 32  # embedding, head, norms
ADAPTER = 2 * 4 * (64 + 48 + 48 + 64 + 3 * 80)  # r = 4
SIZE = {"tokens": 100, "supervised": 50, "longest": 10, "device": torch.device("cuda")}


@pytest.mark.parametrize(
    ("shared", "base", "adapters", "optimizer"),
    [
        (Sharding(0, 4), OUTSIDE + 2 * LAYER, 8, 8),
        (Sharding(1, 4), OUTSIDE + 2 * LAYER, 8, 12 / 4),
        (Sharding(2, 4), OUTSIDE + 2 * LAYER, 4 + 4 / 4, 12 / 4),
        (Sharding(3, 4), (OUTSIDE + 2 * LAYER) / 4 + OUTSIDE + 2 * LAYER, 4 + 4 / 4, 8 / 4),
    ],
)
def test_each_process_holds_its_part(tiny_llama, shared, base, adapters, optimizer):
    found = step_memory(make_module(tiny_llama).options, 3, **SIZE, shared=shared)
    assert found.base == 4 * base
    assert found.adapters == 3 * ADAPTER * adapters
    assert found.optimizer == 3 * ADAPTER * optimizer


def test_a_head_in_parts_takes_all_logits(tiny_llama):
    whole, parts = (
        step_memory(make_module(tiny_llama).options, 3, **SIZE, shared=Sharding(stage, 2)) for stage in (2, 3)
    )
    assert parts.activations - whole.activations == 50 * 257 * (2 * 4 + 12 - 4 - 8)


@pytest.mark.parametrize(
    ("strategy", "stage"),
    [("auto", 0), ("ddp", 0), (lambda: zero(2), 2), (lambda: zero(3), 3), (FSDP2Strategy, 3)],
)
def test_the_estimate_of_a_run_knows_its_strategy(tiny_llama, strategy, stage):
    model, data = make_module(tiny_llama), make_data()
    data.tokenizer = model.tokenizer
    data.setup("fit")
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1 if strategy == "auto" else 4,
        strategy=strategy() if callable(strategy) else strategy,
        logger=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    forwards = data.train_dataloader().sampler.largest_forwards(data.seeds)
    sizes = [{"tokens": 3 * f.tokens, "supervised": 3 * f.scored, "longest": f.length} for f in forwards]
    shared, device = Sharding(stage, trainer.num_devices), torch.device("cpu")
    expected = [step_memory(model.options, 3, **size, shared=shared, device=device) for size in sizes]
    assert memory_of(trainer, model.options, data)(3) == max(expected, key=lambda memory: memory.total)


def test_the_processes_of_a_machine_share_its_memory():
    silent = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    one, four = pl.Trainer(**silent, devices=1), pl.Trainer(**silent, devices=4, strategy="ddp")
    assert device_memory(four) == device_memory(one) // 4


@pytest.mark.slow
def test_the_estimate_is_within_a_fifth_of_the_peak(tmp_path):
    """SmolLM2 and two other shapes, each in a process of its own."""
    settings = ("smollm2, 3 x 8 rows of 29", "llama6, 3 x 4 rows of 256", "wide4, 2 x 4 rows of 300")
    script, out = ROOT / "benchmarks" / "memory.py", tmp_path / "out.json"
    for setting in settings:
        subprocess.run([sys.executable, script, "--fixed", "--only", setting, "--out", out], check=True)
        (record,) = json.loads(out.read_text())
        assert 0.8 <= record["ratio"] <= 1.25, record
        out.unlink()


@pytest.mark.slow
def test_the_activations_are_those_that_are_alive(tmp_path):
    """In every mode of recomputation, counted without an allocator."""
    script, out = ROOT / "benchmarks" / "recompute.py", tmp_path / "out.json"
    subprocess.run([sys.executable, script, "--model", "wide6", "--rows", "2", "--out", out], check=True)
    for record in json.loads(out.read_text()):
        assert 0.95 <= record["estimate"] / record["peak"] <= 1.2, record


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_the_parameters_counted_are_those_that_are_trained(tiny_llama, adapter):
    module = built(tiny_llama, 42, adapter=adapter)
    assert sum(p.numel() for p in module.stack.parameters("seed_42")) == trainable_parameters(module.options)


def test_the_estimate_counts_modules_that_are_trained_in_full(tiny_llama):
    plain, full = (
        step_memory(make_module(tiny_llama, **o).options, 3, **SIZE) for o in ({}, {"modules_to_save": ENDS})
    )
    weights = 3 * 2 * 257 * 32
    assert full.adapters - plain.adapters == full.optimizer - plain.optimizer == 8 * weights
    assert full.activations - plain.activations == 50 * 257 * (2 * 4 + 12 - 4 - 8)
    half = step_memory(make_module(tiny_llama, modules_to_save=ENDS, dtype="bfloat16").options, 3, **SIZE)
    small = step_memory(make_module(tiny_llama, dtype="bfloat16").options, 3, **SIZE)
    assert half.activations - small.activations == 50 * 257 * (2 * 2 + 12 - 2 - 8) + 2 * weights


def test_the_estimate_counts_every_weight_of_whole_models(tiny_llama):
    module = make_module(tiny_llama, **FULL, dtype="bfloat16")
    parameters = sum(p.numel() for p in plain_model(tiny_llama).parameters())
    assert trainable_parameters(module.options) == parameters
    one, two = (step_memory(module.options, n, **SIZE) for n in (1, 2))
    assert one.base == 2 * parameters
    assert one.adapters == one.optimizer == two.adapters - one.adapters == 8 * parameters
    assert two.activations - one.activations == 2 * parameters
    assert work(module.options).operations(tokens=1, scored=0) == 6 * sum(d * k for d, k in module_shapes(tiny_llama))


def module_shapes(folder):
    return [layer.weight.shape for name, layer in plain_model(folder).named_modules() if "proj" in name]


def test_the_largest_stack_that_fits_is_chosen():
    def memory(n):
        return Memory(base=10, adapters=n, optimizer=n, activations=8 * n)

    assert fitting_stack(5, memory, 1000) == 5
    assert fitting_stack(5, memory, 50) == 3
    assert fitting_stack(5, memory, 1) == 1
