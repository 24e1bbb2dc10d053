"""The speed that is logged, by a clock that the test sets and operations counted by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from seedlora.callbacks import Throughput, throughput
from seedlora.training.replicas import FitSettings
from tests.helpers.models import built, make_module, replicas

# The tiny Llama: weights of the layers, of the head, of an adapter of rank 4
BODY = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
HEAD = 257 * 32
ADAPTER = 2 * 4 * (64 + 48 + 48 + 64 + 3 * 80)
PEAK = 10**9


@pytest.fixture
def run(tiny_llama, monkeypatch):
    """Two seeds on two ranks, a second per micro-batch of 2 x 3 rows of 10 tokens, 4 of them scored."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(throughput, "get_available_flops", lambda device, dtype: PEAK)
    module, callback, logged, lines = make_module(tiny_llama), Throughput(window=4), {}, []
    module.prepare_fit(FitSettings(replicas(1, 2), total_steps=100))
    module.log = lambda name, value, **_: logged.update({name: float(value)})
    trainer = SimpleNamespace(
        global_step=0,
        fast_dev_run=False,
        world_size=2,
        accumulate_grad_batches=3,
        is_global_zero=True,
        progress_bar_callback=SimpleNamespace(print=lines.append),
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    module.last_forward = 60, 24.0

    def steps(count, seconds=1.0):
        for _ in range(count):
            clock.now += seconds
            callback.on_train_batch_end(trainer, module, None, None, 0)

    callback.on_train_start(trainer, module)
    return SimpleNamespace(**locals())


def test_tokens_and_utilisation(run):
    run.steps(1)
    assert not run.logged
    run.steps(3, seconds=0.5)
    assert run.logged["speed/tokens_per_s"] == 2 * 60 / 0.5
    each = 60 * (4 * BODY + 6 * ADAPTER) + 24 * 4 * HEAD
    assert run.logged["speed/mfu"] == pytest.approx(each / 0.5 / PEAK)


def test_without_a_known_peak_there_is_no_utilisation(run):
    run.callback._peak = None
    run.steps(2)
    assert list(run.logged) == ["speed/tokens_per_s"]


def test_stopped_seeds_are_not_counted(tiny_llama):
    module = built(tiny_llama, 1, 2)
    strategy = SimpleNamespace(reduce=lambda tensor, reduce_op: 2 * tensor)  # another rank with the same rows
    module._trainer = SimpleNamespace(strategy=strategy, world_size=2, accumulate_grad_batches=1)
    module.log_dict = lambda *_, **__: None
    labels = torch.full((2, 3, 10), -100)
    labels[:, :, -4:] = 7
    batch = {"input_ids": torch.zeros(2, 3, 10, dtype=torch.long), "labels": labels}
    batch |= {"lengths": (10, 10), "num_items": torch.tensor([12, 12])}
    module.training_step(batch, 0)
    assert module.last_forward == (60, 24)
    module.replicas.stop("seed_2")
    module.training_step(batch, 0)
    assert module.last_forward == (30, 12)


def test_a_validation_is_no_part_of_the_time(run):
    run.steps(2)
    run.clock.now += 1000
    run.callback.on_validation_end(run.trainer, run.module)
    run.steps(2)
    assert run.logged["speed/tokens_per_s"] == 2 * 60


def test_the_rest_of_the_fit_is_foretold_once(run):
    run.steps(1, seconds=60)  # the first step, which compiles
    run.steps(11)
    assert not run.lines
    run.trainer.global_step = 4
    run.steps(5)
    line = "3 s a step: about 0:04:48 (h:mm:ss) to train seed_1, seed_2, 96 steps from here"
    assert run.lines == [line]


def test_a_dry_run_is_not_foretold(run):
    run.trainer.fast_dev_run = 5
    run.callback.on_train_start(run.trainer, run.module)
    run.trainer.global_step = 4
    run.steps(5)
    assert not run.lines


def test_validation_and_merging_are_no_part_of_the_training(run):
    callback, trainer, module = run.callback, run.trainer, run.module
    run.clock.now = 100.0
    callback.setup(trainer, module, "fit")
    for seconds, hook in (
        (1, callback.on_validation_start),  # Lightning's sanity check
        (2, callback.on_validation_end),
        (4, callback.on_train_start),
        (8, callback.on_validation_start),
        (16, callback.on_validation_end),
        (32, callback.on_train_end),
        (64, callback.on_fit_end),
        (128, callback.on_validation_start),  # a Trainer.validate afterwards
    ):
        run.clock.now += seconds
        hook(trainer, module)
    assert callback.took == {"starting": 7, "training": 40, "validation": 16, "fusing": 64}
