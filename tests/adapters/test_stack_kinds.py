"""Every kind of adapter, stacked: PEFT's own forward is the reference, one adapter at a time."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers.pytorch_utils import Conv1D

from seedlora.adapters.reading import read_adapter
from seedlora.adapters.stack import AdapterStack
from seedlora.adapters.writing import write_adapter
from seedlora.run.memory import trainable_parameters
from tests.helpers.models import KINDS, ROWS, SEEDS, make_module, moved
from tests.helpers.precision import SAME, plain_model
from tests.helpers.training import quantized_lora


def peft_model(module, name):
    """A PEFT model of its own with one adapter of the module, whole weights as its layers multiply by them as base.

    PiSSA's base is the residual.
    """
    base = plain_model(module.options.base_path)
    config = module.options.lora_config()
    config.fan_in_fan_out = module.options.saved_config().fan_in_fan_out
    model = get_peft_model(base, config, adapter_name=name)
    with torch.no_grad():
        for path, layer in module.stack.layers.items():
            theirs = model.get_base_model().get_submodule(path)
            weight = weight_of(layer.base_layer)
            if layer.stack_start is not None and layer.stack_start.frozen_block_of == "own":
                weight = weight - layer.scaling[name] * layer.stack_start.B @ layer.stack_start.A
            theirs.base_layer.weight.copy_(weight.T if theirs.fan_in_fan_out else weight)
            for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
                if name in getattr(layer, part):
                    getattr(theirs, part)[name].weight.copy_(getattr(layer, part)[name].weight)
    return model


def weight_of(layer):
    """The weights (D, K) that a layer multiplies by, whatever it keeps."""
    width = layer.nx if isinstance(layer, Conv1D) else layer.in_features
    columns = layer(torch.eye(width))
    return (columns if layer.bias is None else columns - layer.bias).T


def close(adapter, quantization):
    """How closely: DoRA's norms of int8 weights take bitsandbytes' constant for 1/127, which is off by 4e-9 of it."""
    near = 1e-8 if (adapter, quantization) == ("dora", "int8") else SAME
    return {"atol": near, "rtol": near}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("adapter", "quantization"), KINDS)
@torch.no_grad()
def test_each_block_of_rows_goes_through_its_own_adapter(tiny_llama, adapter, quantization):
    module = moved(tiny_llama, *SEEDS, adapter=adapter, quantization=quantization)
    names = ["seed_202", None, "seed_11"]
    module.stack.route(names)
    stacked = module.model(input_ids=ROWS).logits
    for name, rows, logits in zip(names, ROWS.chunk(3), stacked.chunk(3), strict=True):
        if name is not None:
            expected = peft_model(module, name)(input_ids=rows).logits
            torch.testing.assert_close(logits, expected, **close(adapter, quantization))


def test_a_row_of_zeros_does_not_spoil_dora(tiny_llama):
    module = make_module(tiny_llama, adapter="dora")
    module.setup("fit")
    layer = next(iter(module.stack.layers.values()))
    layer.base_layer.weight.data[3] = 0
    stack = AdapterStack(module.model)
    stack.route(["seed_42"])
    module.model(input_ids=ROWS).logits.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in stack.parameters("seed_42"))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("adapter", "quantization"), [pair for pair in KINDS if pair != ("pissa", "nf4")])
@torch.no_grad()
def test_peft_loads_what_is_saved_to_the_same_logits(tiny_llama, tmp_path, adapter, quantization):
    """On the original base, or on what transformers quantises it to: LoftQ's folder too is for that one."""
    module = moved(tiny_llama, *SEEDS, adapter=adapter, quantization=quantization)
    stack = module.stack
    write_adapter(
        tmp_path, stack.stored_factors("seed_42"), module.options.saved_config(), magnitudes=stack.magnitudes("seed_42")
    )
    model = PeftModel.from_pretrained(quantized_lora(adapter, quantization)(tiny_llama)[0], tmp_path).train()
    stack.route(["seed_42"])
    ours = module.model(input_ids=ROWS).logits
    torch.testing.assert_close(ours, model(input_ids=ROWS).logits, **close(adapter, quantization))
    stack.route([None])
    assert not torch.allclose(ours, module.model(input_ids=ROWS).logits, atol=1e-2)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
@torch.no_grad()
def test_dora_on_layers_with_biases_and_on_conv1d_is_peft_s(families, family, quantization):
    module = moved(str(families / family), 42, adapter="dora", target_modules="all-linear", quantization=quantization)
    module.stack.route(["seed_42"])
    logits = module.model(input_ids=ROWS).logits
    expected = peft_model(module, "seed_42")(input_ids=ROWS).logits
    torch.testing.assert_close(logits, expected, **close("dora", quantization))


@pytest.mark.usefixtures("float64")
@torch.no_grad()
def test_patterns_of_rank_and_alpha_are_peft_s(tiny_llama, tmp_path):
    module = moved(
        tiny_llama,
        *SEEDS,
        adapter="pissa",
        target_modules=r".*\.(q_proj|down_proj)",
        rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={"down_proj": 5},
    )
    module.options.check()
    assert {path.rpartition(".")[2] for path in module.stack.layers} == {"q_proj", "down_proj"}
    write_adapter(tmp_path, module.stack.stored_factors("seed_11"), module.options.saved_config())
    model = PeftModel.from_pretrained(quantized_lora("lora", "none")(tiny_llama)[0], tmp_path)
    module.stack.route(["seed_11"])
    logits = module.model(input_ids=ROWS).logits
    torch.testing.assert_close(logits, model(input_ids=ROWS).logits, atol=SAME, rtol=SAME)
    ranks = {path: factors.rank for path, factors in read_adapter(tmp_path).layers.items()}
    assert ranks["model.layers.1.self_attn.q_proj"] == 4
    assert ranks["model.layers.0.self_attn.q_proj"] == 8
    factors = module.stack.factors(["seed_11", "seed_42"])
    assert factors["model.layers.1.self_attn.q_proj"].rank == 4
    trained = sum(p.numel() for p in module.stack.parameters("seed_11"))
    assert trained == trainable_parameters(module.options)
