"""All of a run on a device that is not the CPU: no tensor of one meets one of the other, and the host seldom waits."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext

import lightning.pytorch as pl
import pytest
import torch

from seedlora.callbacks import EnsembleProgressBar, JSONLinesLogger, Throughput
from seedlora.evaluation.generate import Prompt, StackGenerator
from seedlora.merge.registry import METHODS
from tests.helpers.fits import assert_close, fit, fused_on, weights
from tests.helpers.interventions import Poison
from tests.helpers.models import built
from tests.helpers.packing import TASK
from tests.helpers.precision import SAME, assert_trained_alike, in_float64
from tests.helpers.second_device import CPU, DEVICE, OnDevice, on_second_device, second_device

SMALL = {"num_train": 8, "num_val": 4, "num_test": 4}
#: Rows of such lengths that they are joined.
LENGTHS = {**TASK, "max_length": 128}
ON_CPU = {"accelerator": lambda: "cpu"}
ON_DEVICE = {"strategy": on_second_device}
KINDS = {
    "rslora": {"adapter": "rslora", "lora_dropout": 0.2, "lora_plus_ratio": 4},
    "dora": {"adapter": "dora"},
    "pissa": {"adapter": "pissa"},
    "bfloat16": {"dtype": "bfloat16"},
    "in full": {"modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    "full": {"adapter": "full", "learning_rate": 2e-4},
}


@pytest.fixture
def device():
    with second_device() as mode:
        yield mode


class Marks(pl.Callback):
    """What was waited for from the end of one micro-batch to the end of the next."""

    def __init__(self, mode):
        self.mode, self.before, self.steps = mode, None, []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        now = Counter(self.mode.waits)
        if self.before is not None:
            self.steps.append(now - self.before)
        self.before = now


def test_the_device_refuses_what_a_gpu_refuses(device):
    there, here = torch.ones(3, 3, device=DEVICE), torch.ones(3, 3)
    assert (there.device, (there + 1).device, there.cpu().device) == (DEVICE, DEVICE, CPU)
    assert (there * torch.tensor(2.0)).sum().item() == 18
    with pytest.raises(RuntimeError, match="same device"):
        there @ here
    with pytest.raises(RuntimeError, match="same device"):
        torch.cat([here, there])
    with pytest.raises(RuntimeError, match="generator"):
        there.bernoulli_(0.5, generator=torch.Generator())
    with pytest.raises((RuntimeError, TypeError)):
        there.numpy()
    assert device.waits.total() == 2  # .cpu() and .item()


@pytest.mark.usefixtures("float64")
def test_a_run_with_all_that_it_can_choose_gives_what_the_cpu_gives(tiny_llama, tmp_path):
    options = {
        "ensemble": {"stack_size": 2, "merge": "auto_gain", "compare": "ties,dare_linear", "controls": "untrained"},
        "data": SMALL,
        "trainer": {"accumulate_grad_batches": 2, "max_steps": 2, "max_epochs": -1},
    }
    wanted = fit(tiny_llama, tmp_path / "cpu", (1, 2, 3), on=ON_CPU, **options)
    with second_device() as mode:
        found = fit(tiny_llama, tmp_path / "there", (1, 2, 3), on=ON_DEVICE, **options)
    for name in ("seed_1", "seed_3", "soup", "fused"):
        assert_close(weights(found, name), weights(wanted, name), atol=SAME)
    assert found.ensemble.folder.selection["chosen"] == wanted.ensemble.folder.selection["chosen"]
    assert found.results.scores.keys() == wanted.results.scores.keys()
    # what is merged while it is scored is merged there: only a weight or two of a layer come to the host
    assert not any("numpy" in what for what in mode.waits)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_each_kind_train_as_on_the_cpu(tiny_llama, tmp_path, kind):
    rows = {"data": SMALL, "trainer": {"max_steps": 2, "max_epochs": -1}, "test": kind in ("dora", "in full")}
    with nullcontext() if kind == "bfloat16" else in_float64():
        wanted = fit(tiny_llama, tmp_path / "cpu", on=ON_CPU, **rows, **KINDS[kind])
        with second_device():
            found = fit(tiny_llama, tmp_path / "there", on=ON_DEVICE, **rows, **KINDS[kind])
    if kind == "bfloat16":
        assert_trained_alike(weights(found, "seed_2"), weights(wanted, "seed_2"), steps=2, rate=2e-3, noise=1e-2)
    else:
        assert_close(weights(found, "seed_2"), weights(wanted, "seed_2"), atol=SAME)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("rows", [{"pack_tokens": 512}, LENGTHS], ids=["packs", "joined"])
def test_a_run_with_packs_and_seeds_that_end_early_gives_what_the_cpu_gives(tiny_llama, tmp_path, rows):
    options = {
        "ensemble": {"on_divergence": "exclude", "patience": 1, "keep": "best", "checkpoint_every_n_steps": 1},
        "data": {**SMALL, **rows},
        "lora_dropout": 0.1,
    }
    trainer = {"val_check_interval": 1, "callbacks": [Poison("seed_2", 1)]}
    wanted = fit(tiny_llama, tmp_path / "cpu", (1, 2, 3), on=ON_CPU, trainer=trainer, **options)
    with second_device():
        found = fit(tiny_llama, tmp_path / "there", (1, 2, 3), on=ON_DEVICE, trainer=trainer, **options)
    assert found.ensemble.excluded.keys() == wanted.ensemble.excluded.keys() == {"seed_2"}
    assert_close(weights(found, "fused"), weights(wanted, "fused"), atol=SAME)


def test_the_host_waits_three_times_in_a_micro_batch(tiny_llama, tmp_path, device):
    marks, log = Marks(device), JSONLinesLogger(tmp_path / "metrics.jsonl")
    trainer = {"callbacks": [Throughput(), EnsembleProgressBar(), marks], "logger": log, "limit_val_batches": 0}
    trainer |= {"enable_progress_bar": True}
    fit(tiny_llama, tmp_path / "run", on=ON_DEVICE, data=SMALL, trainer=trainer, test=False)
    assert len(marks.steps) == 3
    for waits in marks.steps:
        assert waits == {
            "aten._local_scalar_dense.default in attention.choosing": 1,  # transformers: are rows packed?
            "aten.nonzero.default in losses.next_tokens": 1,
            "copy in micro_batch.micro_batch_losses": 1,
        }


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", METHODS)
def test_rules_merge_as_on_the_cpu(device, method):
    wanted = fused_on(CPU, method)
    for path, factors in fused_on(DEVICE, method).items():
        assert isinstance(factors.A, OnDevice)
        assert isinstance(factors.B, OnDevice)
        assert torch.allclose(factors.dense().cpu(), wanted[path].dense(), rtol=0, atol=SAME)


def test_generated_texts_are_those_of_the_cpu(tiny_llama):
    module = built(tiny_llama, 1, 2)
    prompts = {"a": [Prompt("1 + 1 ="), Prompt("two")], "b": [Prompt("3"), Prompt("a longer one")], "mean": []}
    prompts["mean"] = prompts["a"]

    def said():
        heard = {}
        StackGenerator(
            module.model.get_base_model(),
            module.tokenizer,
            route=module.stack.route,
            frozen=module.stack.frozen,
            adapters={"a": "seed_1", "b": "seed_2"},
            mixtures={"mean": ["a", "b"]},
        )(prompts, max_new_tokens=5, stops=["7"], on_done=lambda name, i, text: heard.update({(name, i): text}))
        return heard

    wanted = said()
    with second_device():
        module.to(DEVICE)
        assert said() == wanted
    assert len(wanted) == 6
