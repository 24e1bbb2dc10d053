"""Where PiSSA and LoftQ start: at the best approximation of the base's weights."""

from __future__ import annotations

import pytest
import torch

from seedlora.model.quantization import dequantized_weight, quantize_layer
from seedlora.training.replicas import FitSettings
from tests.helpers.models import ROWS, make_module, replicas
from tests.helpers.precision import SAME, plain_model


@pytest.mark.usefixtures("float64")
@torch.no_grad()
def test_the_base_model_of_pissa_is_the_original_bit_for_bit(tiny_llama):
    module = make_module(tiny_llama, adapter="pissa")
    module.setup("fit")
    original = plain_model(tiny_llama)(input_ids=ROWS).logits
    module.stack.route([None])
    assert torch.equal(module.model(input_ids=ROWS).logits, original)
    module.stack.route(["seed_42"])
    torch.testing.assert_close(module.model(input_ids=ROWS).logits, original, atol=SAME, rtol=SAME)
    for path, factors in module.stack.factors(["seed_42"]).items():
        assert factors.rank == 8
        assert factors.dense().abs().max() < 1e-6, path


@torch.no_grad()
def test_pissa_starts_at_the_best_approximation_of_a_weight(tiny_llama):
    module = make_module(tiny_llama, adapter="pissa")
    module.setup("fit")
    for layer in module.stack.layers.values():
        w = layer.base_layer.weight
        rest = w - layer.scaling["seed_42"] * layer.stack_start.B @ layer.stack_start.A
        best = torch.linalg.svdvals(w)[4:].norm()
        assert best * 0.9999 < rest.norm() < best * 1.01


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("adapter", ["pissa", "loftq"])
@torch.no_grad()
def test_starts_on_a_4_bit_base_lose_less_than_the_base_alone(tiny_llama, adapter):
    """And what is loaded, or is no adapter, has PiSSA's start beside it, because the layer holds the residual."""
    module = make_module(tiny_llama, adapter=adapter, quantization="nf4")
    module.prepare_fit(FitSettings(replicas(11, 42)))
    module.setup("fit")
    original = plain_model(tiny_llama)
    lost = torch.zeros(2)
    for path, layer in module.stack.layers.items():
        w = original.get_submodule(path).weight
        start = layer.scaling["seed_42"] * layer.stack_start.B @ layer.stack_start.A
        alone = dequantized_weight(quantize_layer(original.get_submodule(path), "nf4"))
        lost += torch.stack(
            [(dequantized_weight(layer.base_layer) + start - w).square().sum(), (alone - w).square().sum()]
        )
        assert torch.equal(layer.lora_A["seed_11"].weight, layer.lora_A["seed_42"].weight)
    assert lost[0] < 0.95 * lost[1]
    module.stack.load("copy", module.stack.factors(["seed_42"]))
    outputs = []
    for name in ("copy", "seed_42", None):
        module.stack.route([name])
        outputs.append(module.model(input_ids=ROWS).logits)
    torch.testing.assert_close(outputs[0], outputs[1], atol=SAME, rtol=SAME)
    # PiSSA starts at its base; LoftQ starts closer to the original than the 4-bit base is
    assert torch.allclose(outputs[1], outputs[2], atol=1e-5) == (adapter == "pissa")
