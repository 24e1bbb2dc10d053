"""What is used of bitsandbytes beyond its documentation is still there."""

from __future__ import annotations

import inspect

import torch

from seedlora.model.quantization import quantize_layer


class TestBitsandbytes:
    """What :func:`seedlora.model.quantization.quantize_layer` sets and reads."""

    def test_quantize_layer_in_4_bits(self):
        layer = quantize_layer(torch.nn.Linear(64, 64, bias=False), "nf4")
        assert "support_avx512bf16_for_cpu" in inspect.getsource(type(layer))
        assert layer.weight.quant_state.nested

    def test_quantize_layer_in_8_bits(self):
        layer = quantize_layer(torch.nn.Linear(64, 32, bias=False), "int8")
        assert layer.weight.SCB.shape == (32,)
