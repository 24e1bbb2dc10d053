"""Strategies by name: which is made, what each is told, and what is refused."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from seedlora.distributed.strategies import (
    CPUDeepSpeedStrategy,
    FSDP2Strategy,
    check_batches,
    choose_strategy,
    prepare_strategy,
)


def test_the_words_of_the_command_line():
    for word, stage in (("deepspeed_stage_1", 1), ("deepspeed_stage_2", 2), ("deepspeed_stage_3", 3)):
        strategy = choose_strategy(word, accelerator="cpu")
        assert isinstance(strategy, CPUDeepSpeedStrategy)
        assert strategy.config["zero_optimization"]["stage"] == stage
        assert choose_strategy(word, accelerator="gpu") == word
    assert isinstance(choose_strategy("fsdp2", accelerator="gpu"), FSDP2Strategy)
    assert choose_strategy("ddp", accelerator="cpu") == "ddp"
    given = DDPStrategy()
    assert type(choose_strategy(given, accelerator="cpu")) is DDPStrategy
    assert choose_strategy(given, accelerator="cpu") is not given


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        ("ddp_spawn", {}, "ddp_spawn. starts its processes out of this one.*use ddp"),
        ("fsdp", {}, "fsdp. flattens frozen and trained.*use fsdp2"),
        ("deepspeed_stage_2", {"precision": "bf16-mixed"}, "bf16-mixed. under CPUDeepSpeedStrategy.*set dtype"),
        ("deepspeed_stage_2", {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}, "value.*choose norm"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(strategy, options, message):
    with pytest.raises(ValueError, match=message):
        chosen = choose_strategy(strategy, accelerator="cpu")
        prepare_strategy(pl.Trainer(strategy=chosen, accelerator="cpu", devices=1, logger=False, **options))


def test_deepspeed_does_not_clip_a_second_time():
    strategy = choose_strategy("deepspeed_stage_2", accelerator="cpu")
    prepare_strategy(pl.Trainer(strategy=strategy, accelerator="cpu", devices=1, logger=False, gradient_clip_val=0.1))
    assert strategy.config["gradient_clipping"] == 0.0
    assert strategy.config["zero_allow_untested_optimizer"] is True
    with pytest.raises(ValueError, match="must not have a section 'bf16'"):
        strategy = CPUDeepSpeedStrategy(config={"bf16": {"enabled": True}})
        prepare_strategy(pl.Trainer(strategy=strategy, accelerator="cpu", devices=1, logger=False))


def test_deepspeed_leaves_the_base_model_in_its_dtype():
    strategy = choose_strategy("deepspeed_stage_2", accelerator="cpu")
    trainer = pl.Trainer(strategy=strategy, accelerator="cpu", devices=1, logger=False)
    prepare_strategy(trainer)
    module = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    assert trainer.strategy.precision_plugin.convert_module(module).weight.dtype == torch.bfloat16


def test_deepspeed_needs_whole_steps():
    strategy = choose_strategy("deepspeed_stage_2", accelerator="cpu")
    trainer = pl.Trainer(strategy=strategy, accelerator="cpu", devices=1, logger=False, accumulate_grad_batches=2)
    check_batches(trainer, 4)
    with pytest.raises(ValueError, match="leaves 5 micro-batches.*accumulate_grad_batches 2 does not divide"):
        check_batches(trainer, 5)


def test_a_quantised_base_is_not_split_over_processes(tiny_llama):
    strategy = choose_strategy("deepspeed_stage_3", accelerator="cpu")
    trainer = pl.Trainer(strategy=strategy, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="quantization nf4 and CPUDeepSpeedStrategy.*use ddp or deepspeed_stage_2"):
        prepare_strategy(trainer, quantization="nf4")


def test_weights_in_full_are_not_split_over_processes():
    strategy = choose_strategy("deepspeed_stage_3", accelerator="cpu")
    trainer = pl.Trainer(strategy=strategy, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    with pytest.raises(
        ValueError, match="modules_to_save.*CPUDeepSpeedStrategy, which splits.*use ddp or deepspeed_stage_2"
    ):
        prepare_strategy(trainer, full="modules_to_save norm")


@pytest.mark.parametrize("name", ["deepspeed_stage_3", "fsdp2"])
def test_layers_in_parts_are_not_compiled(name):
    strategy = choose_strategy(name, accelerator="cpu")
    trainer = pl.Trainer(strategy=strategy, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="compile inductor and .*Strategy, which splits.*use ddp"):
        prepare_strategy(trainer, backend="inductor")
