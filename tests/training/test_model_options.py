"""What is known of a model without its weights, and what is refused before they are loaded."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest
from transformers import MixtralConfig, MixtralForCausalLM

from seedlora.training.model_options import ModelOptions
from seedlora.training.module import SeedLoRAModule
from seedlora.training.replicas import ReplicaOptions
from tests.helpers.models import FULL, make_module


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
    one, three = options.lora_config(), options.of_replica(ReplicaOptions(rank_factor=3)).lora_config()
    root = 0.5 if adapter == "rslora" else 1
    assert (three.r, three.rank_pattern) == (12, {"q_proj": 6})
    assert three.lora_alpha / three.r**root == pytest.approx(one.lora_alpha / one.r**root)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": "lokr"}, "Unknown adapter 'lokr'; choose one of lora, rslora, dora, pissa"),
        ({"quantization": "fp4"}, "Unknown quantization 'fp4'; choose one of none, nf4, int8"),
        ({"adapter": "loftq"}, "adapter=.loftq. starts at what nf4 loses; set quantization=.nf4., got none"),
        ({"adapter": "loftq", "quantization": "int8"}, "set quantization=.nf4., got int8"),
        ({"adapter": "pissa", "quantization": "int8"}, "pissa. goes with quantization none or nf4, got int8"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern must be at least 1 everywhere, got {'q_proj': 0}"),
        (
            {"target_modules": ["query"]},
            "target_modules query: base model .* has no such linear layer; it has down",
        ),
        (
            {"target_modules": "q_proj"},
            "'q_proj' matches the whole path of no linear layer, for example model.layers.0",
        ),
        ({"target_modules": "(q"}, r"'\(q' is no regular expression"),
        ({"target_modules": ["lm_head"]}, "lm_head: base model .* has no such linear layer"),
        ({"rank_pattern": {"query": 2}}, "rank_pattern: 'query' matches no adapted layer, e.g. model.layers.0"),
        ({"adapter": "pissa", "r": 64}, "r 64: pissa takes at most 32 directions of model.layers.0"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_loads(tiny_llama, options, message):
    with pytest.raises(ValueError, match=message):
        make_module(tiny_llama, **options).options.check()


def test_a_missing_bitsandbytes_is_said_at_once(tiny_llama, monkeypatch):
    monkeypatch.setattr("seedlora.model.quantization.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="quantization nf4 needs bitsandbytes: pip install bitsandbytes"):
        make_module(tiny_llama, quantization="nf4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"modules_to_save": ["head"]},
            "modules_to_save head: base model .* has no such module that holds weights",
        ),
        ({"modules_to_save": ["mlp"]}, "mlp: base model .* holds weights itself; it has embed_tokens, q_proj"),
        ({"modules_to_save": ["o_proj"]}, "layers.0.self_attn.o_proj is among target_modules too"),
        (
            {"modules_to_save": ["o_proj"], "target_modules": ["q_proj"], "quantization": "nf4"},
            "layers.0.self_attn.o_proj would be quantised, and weights in nf4 take no gradient",
        ),
    ],
)
def test_what_cannot_be_trained_in_full_is_refused_before_anything_loads(tiny_llama, options, message):
    with pytest.raises(ValueError, match=message):
        make_module(tiny_llama, **options).options.check()


def test_experts_do_not_see_their_rows_in_order(tiny_llama, tmp_path):
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = MixtralConfig(vocab_size=257, num_local_experts=2, **size)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="mlp.experts of base model .* does not see whole rows in their order"):
        make_module(str(tmp_path), modules_to_save=["experts"], target_modules=["q_proj"]).options.check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"quantization": "nf4"},
            "adapter=.full. trains every weight in full, to which quantization nf4 does",
        ),
        ({"lora_plus_ratio": 4.0}, "lora_plus_ratio 4.0 does not apply"),
        ({"modules_to_save": ["norm"]}, "modules_to_save .'norm'. does not apply"),
        ({"lora_dropout": 0.1}, "lora_dropout 0.1 does not apply"),
        ({"r": 16}, "r 16 does not apply"),
        ({"lora_alpha": 32}, "lora_alpha 32 does not apply"),
        ({"target_modules": "all-linear"}, "target_modules all-linear does not apply"),
    ],
)
def test_options_of_adapters_are_refused_where_there_is_none(tiny_llama, options, message):
    with pytest.raises(ValueError, match=message):
        make_module(tiny_llama, **{**FULL, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": "inducter"}, "Unknown compile 'inducter'; choose one of .*aot_eager.*, inductor"),
        (
            {"compile": "inductor", "lora_dropout": 0.1},
            "compile inductor .* lora_dropout 0.1",
        ),
    ],
)
def test_what_cannot_be_compiled_is_refused_before_anything_loads(tiny_llama, options, message):
    with pytest.raises(ValueError, match=message):
        make_module(tiny_llama, **options)
