"""The same code on a CUDA device.

``SEEDLORA_TEST_DEVICE=cuda pytest tests/devices/test_gpu.py`` runs it, as ``tests/check.py`` does where one is.

With ``SEEDLORA_TEST_DEVICE=cpu`` the same tests run on the CPU, as far as they mean something there.
"""

from __future__ import annotations

import json
import os
from importlib.util import find_spec

import lightning.pytorch as pl
import pytest
import torch

from seedlora.callbacks import Throughput
from seedlora.merge.registry import METHODS
from seedlora.model.attention import Documents, by_varlen_kernel, padded
from seedlora.run.cost import PeakMemory
from seedlora.run.memory import memory_of
from tests.helpers import strategies_job
from tests.helpers.fits import assert_alike, assert_close, fit, fused_on, weights
from tests.helpers.models import built, make_data, make_module, replicas, save_tiny_llama

DEVICE = torch.device(os.environ.get("SEEDLORA_TEST_DEVICE", "cuda"))
CUDA = DEVICE.type == "cuda"
ON = {"accelerator": lambda: "gpu" if CUDA else "cpu", "devices": lambda: 1}
#: Attention's backward pass on a GPU adds in any order unless it is told not to; a warning does not tell it.
SAME_BITS = {"deterministic": True}
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(CUDA and not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _exact_products():
    """No TF32, which is torch's default too."""
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.fixture
def smollm2(tmp_path):
    """Random weights in the shape of the main job's model."""
    save_tiny_llama(tmp_path / "model", seed=0, **(SMOLLM2 if CUDA else {}))
    return str(tmp_path / "model")


class CutOffError(Exception):
    """What ends a run."""


#: What of the activations is recomputed.
RECOMPUTED = [{"gradient_checkpointing": which} for which in ("selective", "full")]


class Interrupt(pl.Callback):
    """Ends a run before its fourth step."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 3:
            raise CutOffError


@pytest.mark.parametrize(
    "options",
    [{}, {"lora_dropout": 0.1}, {"adapter": "dora"}, *RECOMPUTED],
    ids=str,
)
def test_a_replica_of_a_stack_is_its_standalone_run(tiny_llama, tmp_path, options):
    stack = fit(tiny_llama, tmp_path / "stack", [1, 2, 3], on=ON, trainer=SAME_BITS, test=False, **options)
    alone = fit(tiny_llama, tmp_path / "alone", [2], on=ON, trainer=SAME_BITS, test=False, **options)
    assert_alike(stack.dirpath, alone.dirpath, 2)


def test_the_kernel_for_rows_of_any_lengths_equals_the_padded_one():
    if not CUDA:
        pytest.skip("torch has that kernel for CUDA devices alone")
    lengths = (5, 300, 1, 77)
    documents, found = Documents(lengths, DEVICE), []
    for compute in (padded, by_varlen_kernel):
        generator = torch.Generator().manual_seed(0)
        given = [
            torch.randn(1, h, sum(lengths), 64, generator=generator).to(DEVICE, torch.bfloat16).requires_grad_()
            for h in (9, 3, 3)
        ]
        for window in (None, 100):
            out = compute(*given, documents, 0.125, window)
            out.float().square().sum().backward()
            found.append(out)
        found += [each.grad for each in given]
    for wanted, got in zip(found[:5], found[5:], strict=True):
        torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_joined_rows_train_as_rows_on_their_own(tiny_llama, tmp_path, dtype):
    rows = {"task": "chain_sum", "task_options": {"min_terms": 2, "max_terms": 12}, "max_length": 128, "batch_size": 4}
    made = {}
    for pack_tokens in ("auto", None):
        folder = tmp_path / str(pack_tokens)
        data = {**rows, "pack_tokens": pack_tokens}
        made[pack_tokens] = fit(tiny_llama, folder, [1, 2], on=ON, data=data, test=False, dtype=dtype)
    noise = 1e-4 if dtype == "float32" else 0.2
    joined, alone = (weights(run, "seed_2") for run in made.values())
    for key, wanted in alone.items():
        assert (joined[key] - wanted).norm() <= noise * wanted.norm(), key


def test_the_device_changes_nothing_but_rounding(tiny_llama, tmp_path):
    there = fit(tiny_llama, tmp_path / "there", on=ON)
    here = fit(tiny_llama, tmp_path / "here", on={"accelerator": lambda: "cpu"})
    for seed in (1, 2):
        assert_alike(there.dirpath, here.dirpath, seed)
    assert there.results.scores["fused"].n == 12


def test_a_run_in_passes_gives_the_seeds_of_one_stack(tiny_llama, tmp_path):
    choice = {"merge": "auto", "compare": "ties,dare_linear", "controls": "untrained"}
    seeds = [1, 2, 3]
    passes = fit(tiny_llama, tmp_path / "x", seeds, on=ON, ensemble={**choice, "stack_size": 2}, trainer=SAME_BITS)
    together = fit(tiny_llama, tmp_path / "y", seeds, on=ON, ensemble={"merge": "soup"}, trainer=SAME_BITS)
    for seed in seeds:
        assert_alike(passes.dirpath, together.dirpath, seed)
    assert {"ties", "dare_linear", "greedy_soup"} <= passes.results.scores.keys()


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": "bfloat16", "lora_dropout": 0.1}, *RECOMPUTED],
    ids=str,
)
@pytest.mark.parametrize("tokens", ["short", "long"])
def test_the_same_seed_gives_the_same_bits(tiny_llama, tmp_path, options, tokens):
    # Longer than a block of keys of any kernel of attention, whose gradients are sums over blocks.
    long = {"task_options": {"min_terms": 100, "max_terms": 120}, "max_length": 1024, "num_train": 12}
    again = {"on": ON, "trainer": SAME_BITS, "test": False, "data": long if tokens == "long" else {}, **options}
    first, second = (fit(tiny_llama, tmp_path / name, **again) for name in "ab")
    assert_close(weights(second, "fused"), weights(first, "fused"), atol=0)


def test_a_resumed_run_has_the_same_bits(tiny_llama, tmp_path):
    options = {"on": ON, "test": False, "lora_dropout": 0.1}
    ensemble = {"checkpoint_every_n_steps": 1, "resume": True}
    whole = fit(tiny_llama, tmp_path / "whole", ensemble=ensemble, trainer=SAME_BITS, **options)
    with pytest.raises(CutOffError):
        fit(tiny_llama, tmp_path / "x", ensemble=ensemble, trainer={**SAME_BITS, "callbacks": [Interrupt()]}, **options)
    resumed = fit(tiny_llama, tmp_path / "x", ensemble=ensemble, trainer=SAME_BITS, **options)
    assert_close(weights(resumed, "fused"), weights(whole, "fused"), atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_rules_merge_as_on_the_cpu(method):
    wanted = fused_on("cpu", method)
    for path, factors in fused_on(DEVICE, method).items():
        assert factors.B.device.type == DEVICE.type
        # Dense rules cut a spectrum off, which one device's SVD and the other's round differently.
        assert torch.allclose(factors.dense().cpu(), wanted[path].dense(), rtol=1e-4, atol=1e-4)


def test_the_main_job_takes_the_memory_that_was_estimated(smollm2, tmp_path):
    small = {} if CUDA else {"num_train": 24, "num_val": 8, "num_test": 8}
    data = {"num_train": 200, "num_val": 16, "num_test": 32, "batch_size": 16, "eval_batch_size": 16, **small}
    ensemble, options = {"merge": "seedlora"}, {"dtype": "bfloat16", "r": 8, "lora_alpha": 16}
    log = {"callbacks": [Throughput()]}
    module, rows = make_module(smollm2, **options), make_data(**data)
    rows.tokenizer = module.tokenizer
    rows.setup()
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    estimate, peak = memory_of(trainer, module.options, rows)(3).total, PeakMemory(DEVICE)
    seeds = [11, 42, 202]
    run = fit(smollm2, tmp_path / "run", seeds, on=ON, ensemble=ensemble, data=data, trainer=log, **options)
    assert run.results.scores["fused"].n == data["num_test"]
    assert all(tensor.isfinite().all() for tensor in weights(run, "fused").values())
    if CUDA:
        print(f"peak {peak.bytes / 2**30:.2f} GiB, estimated {estimate / 2**30:.2f}")
        assert 0.7 < estimate / peak.bytes < 1.4


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_a_stack_on_a_quantised_base_is_its_standalone_run(tiny_llama, tmp_path, quantization):
    options = {"on": ON, "trainer": SAME_BITS, "quantization": quantization}
    stack = fit(tiny_llama, tmp_path / "stack", [1, 2], ensemble={"stack_size": 1}, **options)
    alone = fit(tiny_llama, tmp_path / "alone", [2], test=False, **options)
    assert_alike(stack.dirpath, alone.dirpath, 2)


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": "bfloat16"}, {"adapter": "dora"}, *RECOMPUTED],
    ids=str,
)
def test_compiled_layers_learn_what_eager_ones_do(tiny_llama, tmp_path, options):
    backend = "inductor" if CUDA else "aot_eager"
    eager = fit(tiny_llama, tmp_path / "eager", on=ON, test=False, **options)
    compiled = fit(tiny_llama, tmp_path / "compiled", on=ON, test=False, compile=backend, **options)
    for seed in (1, 2):
        # What is joined into one kernel is not rounded to bfloat16 in between.
        assert_alike(compiled.dirpath, eager.dirpath, seed, noise=1e-2 if "dtype" in options else 1e-5)


@pytest.mark.parametrize("name", ["ddp", "deepspeed_stage_2", "deepspeed_stage_3", "fsdp2"])
@pytest.mark.parametrize("devices", [1, 2])
def test_a_strategy_gives_what_one_process_gives(tiny_llama, tmp_path, devices, name):
    """Over NCCL on GPUs, on one too: a group of one rank takes the same path."""
    if CUDA and torch.cuda.device_count() < devices:
        pytest.skip("needs two CUDA devices")
    for count, each in ((1, "auto"), (devices, name)):
        strategies_job.start(tiny_llama, tmp_path, ON["accelerator"](), count, each)
    folders = (tmp_path / name, tmp_path / "auto")
    assert len({tuple(json.loads((folder / "results.json").read_text())["scores"]) for folder in folders}) == 1
    for seed in (11, 42, 202):
        assert_alike(*folders, seed)


def test_rows_of_a_stack_see_their_own_adapter(tiny_llama):
    module = built(tiny_llama, 1, 2, dtype="bfloat16").to(DEVICE)
    assert tuple(module.replicas) == replicas(1, 2)
    ids = torch.randint(0, 257, (2, 9), device=DEVICE)
    with torch.no_grad():
        module.stack.route(["seed_1", "seed_2"])
        together = module.model(input_ids=ids).logits
        for i, name in enumerate(("seed_1", "seed_2")):
            module.stack.route([name])
            assert torch.allclose(module.model(input_ids=ids[i : i + 1]).logits[0], together[i], atol=2e-2)


@pytest.mark.skipif(not CUDA, reason="a CPU's memory is the process's")
def test_peak_memory_is_the_device_s():
    peak = PeakMemory(DEVICE)
    block = torch.empty(2**24, dtype=torch.uint8, device=DEVICE)
    del block
    assert 2**24 <= peak.bytes < 2**26
