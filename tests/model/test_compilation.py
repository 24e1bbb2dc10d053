"""Compiled decoder layers: the same numbers as without, few graphs, and none outside of training."""

from __future__ import annotations

import shutil

import lightning.pytorch as pl
import pytest
import torch
from torch._dynamo.utils import counters

from seedlora.callbacks import SeedEnsembleCallback
from seedlora.datamodules.rows import ReplicaRows
from tests.helpers.interventions import Poison
from tests.helpers.models import SEEDS, make_data, make_module, moved
from tests.helpers.packing import prepared, sampler_of
from tests.helpers.precision import ROUNDED, SAME, relative
from tests.helpers.training import SILENT, largest_difference, saved, train, trained_updates

NAMES = [f"seed_{seed}" for seed in SEEDS]
#: Two of each seven layers, because tracing takes time.
SOME = {"target_modules": ["q_proj", "down_proj"]}


def graphs():
    """How many were compiled since the last call; no part of a layer may be left out of them."""
    assert not counters["graph_break"], counters["graph_break"]
    number = counters["stats"]["unique_graphs"]
    counters.clear()
    return number


def step(module, ids, names=NAMES, positions=None):
    """Losses and gradients of a step."""
    module.zero_grad()
    module.stack.route(names)
    losses, *_ = module.token_losses(ids, ids, positions)
    losses.sum().backward()
    return [losses.detach(), *(p.grad for name in names for p in module.stack.parameters(name))]


def rows(length, seed=0):
    return torch.randint(257, (6, length), generator=torch.Generator().manual_seed(seed))


def pair(base_model, **options):
    """The same adapters twice, the second one compiled."""
    options = options if options.get("adapter") == "full" else {**SOME, **options}
    found = [moved(base_model, *SEEDS, **options, compile=backend) for backend in (None, "aot_eager")]
    for module in found:
        module.model.train()
    counters.clear()
    return found


def same(a, b, near=SAME):
    for x, y in zip(a, b, strict=True):
        assert (x - y).abs().max() <= near * y.abs().max()


@pytest.mark.usefixtures("float64")
def test_losses_and_gradients_are_those_of_the_eager_layers(tiny_llama):
    """Two graphs for the first length, two for all others, and two more when a seed is left out."""
    eager, compiled = pair(tiny_llama)
    for names, length, expected in (
        (NAMES, 7, 2),
        (NAMES, 12, 2),
        (NAMES, 9, 0),
        (NAMES[::2], 9, 2),
        (NAMES[::2], 8, 0),
        (NAMES, 8, 0),
    ):
        ids = rows(length, seed=length)[: 2 * len(names)]
        same(step(eager, ids, names), step(compiled, ids, names))
        assert graphs() == expected, (names, length)


KINDS = {
    "dora": ({"adapter": "dora"}, 2),
    "pissa": ({"adapter": "pissa"}, 2),
    "nf4": ({"quantization": "nf4"}, 2),
    "int8": ({"quantization": "int8"}, 2),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, 2),
    # whose inputs all take a gradient
    "full recomputation": ({"gradient_checkpointing": "full"}, 1),
    "selective recomputation": ({"gradient_checkpointing": "selective"}, 2),
    "full": ({"adapter": "full"}, 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_and_base_is_compiled(tiny_llama, kind):
    options, expected = KINDS[kind]
    eager, compiled = pair(tiny_llama, **options)
    for seed in range(2):
        # torch.compile does not take float64's mode through bitsandbytes, nor through checkpoints
        same(step(eager, rows(9, seed)), step(compiled, rows(9, seed)), near=ROUNDED)
    assert graphs() == expected


@pytest.mark.usefixtures("float64")
@pytest.mark.slow
def test_packed_rows_are_compiled_too(tiny_llama):
    eager, compiled = pair(tiny_llama)
    data = prepared(compiled)
    for micro in list(sampler_of(data).micro_batches(0))[:3]:
        batch = ReplicaRows(data.rows["train"])[micro]
        ids, positions = batch["input_ids"].flatten(0, 1), batch["position_ids"].flatten(0, 1)
        same(step(eager, ids, positions=positions), step(compiled, ids, positions=positions))
    assert graphs() <= 4


@torch.no_grad()
def test_nothing_is_compiled_for_an_evaluation(tiny_llama):
    eager, compiled = pair(tiny_llama)
    for module in (eager, compiled):
        module.model.eval()
        module.stack.route(["seed_42", None])
    assert torch.equal(eager.model(input_ids=rows(5)).logits, compiled.model(input_ids=rows(5)).logits)
    assert graphs() == 0


@pytest.mark.usefixtures("float64")
@pytest.mark.slow
def test_a_run_with_validations_ends_as_without(tiny_llama, tmp_path):
    """Rows of many lengths, a last batch that is smaller, accumulation, and the fused adapter between the steps."""
    options = {"val_check_interval": 2, "epochs": 2}
    eager = trained_updates(tiny_llama, tmp_path / "eager", SEEDS, module_options=SOME, **options)
    counters.clear()
    backend = {"compile": "aot_eager"}
    compiled = trained_updates(tiny_llama, tmp_path / "compiled", SEEDS, module_options=SOME | backend, **options)
    assert graphs() == 4
    assert max(largest_difference(compiled[seed], eager[seed]) for seed in SEEDS) < SAME


@pytest.mark.usefixtures("float64")
@pytest.mark.slow
def test_a_diverged_seed_is_left_out_of_the_compiled_stack(tiny_llama, tmp_path):
    """And the stack of passes: a second fit compiles for its own seeds."""
    ended = []
    for backend in (None, "aot_eager"):
        callback = SeedEnsembleCallback(
            SEEDS, dirpath=tmp_path / str(backend), merge="none", budget="full", stack_size=2, on_divergence="exclude"
        )
        module = make_module(tiny_llama, compile=backend, **SOME)
        while callback.pending:
            poison = Poison("seed_42", 2)
            trainer = pl.Trainer(max_steps=4, callbacks=[callback, poison], accelerator="cpu", **SILENT)
            trainer.fit(module, datamodule=make_data())
        assert list(callback.ensemble.excluded) == ["seed_42"]
        ended.append([saved(callback.adapter_path(seed)) for seed in (11, 202)])
    for eager, compiled in zip(*ended, strict=True):
        assert max(relative(compiled[key], tensor) for key, tensor in eager.items()) < SAME


@pytest.mark.slow
def test_a_compiled_run_that_stopped_resumes_to_the_same_bits(tiny_llama, tmp_path):
    options = {**SOME, "compile": "aot_eager", "max_steps": 4}
    whole = train(tiny_llama, tmp_path / "whole", SEEDS[:2], **options)
    with pytest.raises(TimeoutError):
        train(tiny_llama, tmp_path / "stopped", SEEDS[:2], stop=3, **options)
    resumed = train(tiny_llama, tmp_path / "stopped", SEEDS[:2], resume=True, **options)
    expected = saved(whole.adapter_path(42))
    assert all(torch.equal(saved(resumed.adapter_path(42))[key], tensor) for key, tensor in expected.items())


@pytest.mark.usefixtures("float64")
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on a CPU")
def test_inductor_trains_the_same(tiny_llama, tmp_path):
    eager = trained_updates(tiny_llama, tmp_path / "eager", SEEDS, module_options=SOME)
    counters.clear()
    compiled = trained_updates(tiny_llama, tmp_path / "compiled", SEEDS, module_options={**SOME, "compile": "inductor"})
    assert graphs() == 4
    assert max(largest_difference(compiled[seed], eager[seed]) for seed in SEEDS) < SAME
