"""What is used of PEFT beyond its documentation is still there: one test for each use, named after it."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from seedlora.model.peft_internals import (
    FULL_MODULE_ATTRIBUTES,
    LORA_LAYER_ATTRIBUTES,
    dequantize_weight,
    no_target_modules,
)
from seedlora.model.quantization import quantize_layer


class TestPEFT:
    def test_no_target_modules(self, tiny_llama):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        config = LoraConfig(target_modules=no_target_modules(), modules_to_save=["lm_head"])
        trained = [
            name for name, parameter in get_peft_model(model, config).named_parameters() if parameter.requires_grad
        ]
        assert [name.split(".")[-4] for name in trained] == ["lm_head"]

    @pytest.mark.parametrize("kind", ["none", "nf4", "int8"])
    def test_dequantize_weight(self, kind):
        layer = torch.nn.Linear(64, 64, bias=False)
        weight = layer.weight.detach().clone()
        stored = layer if kind == "none" else quantize_layer(layer, kind)
        tolerance = {"none": 0, "nf4": 0.03, "int8": 0.002}[kind]
        torch.testing.assert_close(dequantize_weight(stored).float(), weight, atol=tolerance, rtol=0)

    @pytest.mark.parametrize("name", LORA_LAYER_ATTRIBUTES)
    def test_lora_layer_attributes(self, tiny_llama, name):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
        layer = wrapped.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
        assert hasattr(layer, name)

    @pytest.mark.parametrize("name", FULL_MODULE_ATTRIBUTES)
    def test_full_module_attributes(self, tiny_llama, name):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
        assert hasattr(wrapped.get_submodule("base_model.model.lm_head"), name)
