"""What is known of a model without its weights, and who of its replicas trains."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest

from seedlora.training.model_options import ModelOptions
from seedlora.training.module import SeedLoRAModule
from seedlora.training.replicas import DivergedError, FitSettings, ReplicaStates
from tests.helpers.models import replicas


def test_the_options_are_the_arguments_of_the_module():
    """Names, order and defaults; what is None for the command line is empty."""
    arguments = list(inspect.signature(SeedLoRAModule.__init__).parameters.values())[1:]
    options = ModelOptions()
    assert [argument.name for argument in arguments] == [field.name for field in fields(ModelOptions)]
    for argument in arguments:
        value = getattr(options, argument.name)
        assert value == argument.default or (argument.default is None and len(value) == 0), argument.name
    module = SeedLoRAModule()
    assert module.options == options
    assert list(module.hparams) == [argument.name for argument in arguments]


def test_what_is_saved_of_the_options_is_plain():
    module = SeedLoRAModule(target_modules=("q_proj",), modules_to_save=())
    assert (module.hparams["target_modules"], module.hparams["modules_to_save"]) == (["q_proj"], None)
    assert (module.hparams["rank_pattern"], module.hparams["alpha_pattern"]) == ({}, {})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"quantization": "none", "backend": None, "full": None}),
        ({"quantization": "nf4", "compile": "eager"}, {"quantization": "nf4", "backend": "eager", "full": None}),
        ({"modules_to_save": ["norm", "lm_head"]}, {"full": "modules_to_save norm, lm_head"}),
        ({"adapter": "full"}, {"full": "adapter full"}),
    ],
)
def test_options_that_need_the_whole_base_are_named(options, expected):
    found = ModelOptions(**options).needs_whole_base
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize("adapter", ["lora", "rslora"])
def test_a_wider_adapter_has_the_same_scaling(tiny_llama, adapter):
    options = ModelOptions(tiny_llama, adapter=adapter, r=4, lora_alpha=4, rank_pattern={"q_proj": 2})
    one, three = options.lora_config(), options.lora_config(3)
    root = 0.5 if adapter == "rslora" else 1
    assert (three.r, three.rank_pattern) == (12, {"q_proj": 6})
    assert three.lora_alpha / three.r**root == pytest.approx(one.lora_alpha / one.r**root)


def test_a_stopped_replica_and_one_that_diverged_are_idle():
    states = ReplicaStates(FitSettings(replicas(1, 2, 3), on_divergence="exclude"))
    assert len(states) == 3
    states.stop("seed_1")
    states.exclude(["seed_3"], "loss not finite in step 2")
    assert states.idle == {"seed_1", "seed_3"}
    assert states.active == replicas(2)
    assert states.active_positions == [1]
    assert states.diverged == {"seed_3": "loss not finite in step 2"}
    again = ReplicaStates(FitSettings(replicas(1, 2, 3)))
    again.restore(idle=sorted(states.idle), diverged=states.diverged)
    assert (again.idle, again.diverged, tuple(again)) == (states.idle, states.diverged, tuple(states))


def test_a_replica_that_diverges_ends_the_run_unless_it_is_excluded():
    states = ReplicaStates(FitSettings(replicas(1, 2)))
    with pytest.raises(DivergedError, match="^seed_2: why; lower model.learning_rate, or go on without it by on_diver"):
        states.exclude(["seed_2"], "why")
    assert not states.idle
