"""The stacked forward against PEFT's own, one adapter at a time."""

from __future__ import annotations

import pytest
import torch

from seedlora.adapters.stacked_forward import Block, _dora_gain
from seedlora.updates.dora import dora_updates
from seedlora.updates.factors import LoRAFactors
from tests.helpers.models import ROWS, SEEDS, built
from tests.helpers.precision import SAME


def peft_logits(module, name, rows):
    """PEFT's forward, on a copy of the module whose layers are PEFT's again."""
    for layer in module.stack.layers.values():
        saved = vars(layer).pop("forward")
        vars(layer)["_saved"] = saved
    try:
        if name is None:
            with module.model.disable_adapter():
                return module.model(input_ids=rows).logits
        module.model.set_adapter(name)
        return module.model(input_ids=rows).logits
    finally:
        for layer in module.stack.layers.values():
            vars(layer)["forward"] = vars(layer).pop("_saved")


@pytest.mark.usefixtures("float64")
@torch.no_grad()
def test_each_block_of_rows_goes_through_its_own_adapter(tiny_llama):
    module = built(tiny_llama, *SEEDS)
    names = ["seed_202", None, "seed_11"]
    module.stack.route(names)
    stacked = module.model(input_ids=ROWS).logits
    for name, rows, logits in zip(names, ROWS.chunk(3), stacked.chunk(3), strict=True):
        torch.testing.assert_close(logits, peft_logits(module, name, rows), atol=SAME, rtol=SAME)
    assert not torch.allclose(stacked[:2], stacked[4:], atol=1e-3)


@pytest.mark.usefixtures("float64")
@torch.no_grad()
def test_a_loaded_adapter_acts_like_peft_s(tiny_llama):
    module = built(tiny_llama, *SEEDS)
    module.stack.load("copy", module.stack.factors(["seed_42"]))
    module.stack.route(["copy"])
    torch.testing.assert_close(
        module.model(input_ids=ROWS).logits, peft_logits(module, "seed_42", ROWS), atol=SAME, rtol=SAME
    )


@pytest.mark.usefixtures("float64")
@torch.no_grad()
def test_a_layer_left_out_of_a_loaded_adapter_keeps_the_base(tiny_llama):
    module = built(tiny_llama, *SEEDS)
    module.stack.load("empty", {})
    module.stack.route(["empty"])
    torch.testing.assert_close(
        module.model(input_ids=ROWS).logits, peft_logits(module, None, ROWS), atol=SAME, rtol=SAME
    )


@pytest.mark.usefixtures("float64")
def test_gradients_equal_peft_s(tiny_llama):
    module = built(tiny_llama, *SEEDS)
    module.stack.route(["seed_11", "seed_42", "seed_202"])
    module.model(input_ids=ROWS).logits.square().sum().backward()
    stacked = {name: p.grad.clone() for name, p in module.named_parameters() if p.requires_grad}
    for seed, rows in zip(SEEDS, ROWS.chunk(3), strict=True):
        module.zero_grad()
        peft_logits(module, f"seed_{seed}", rows).square().sum().backward()
        for name, parameter in module.named_parameters():
            if f"seed_{seed}" in name:
                torch.testing.assert_close(stacked[name], parameter.grad, atol=SAME, rtol=SAME)


@pytest.mark.usefixtures("float64")
def test_dropout_is_active_and_does_not_depend_on_the_stack(tiny_llama):
    module = built(tiny_llama, *SEEDS, lora_dropout=0.5)
    keys = {seed: (seed, 0, 3, 0) for seed in SEEDS}

    def run(seeds, length):
        rows = torch.cat([ROWS[:2, :length] for _ in seeds])
        module.stack.route(
            [f"seed_{s}" for s in seeds], lengths=[5] * len(seeds), dropout_keys=[keys[s] for s in seeds]
        )
        return module.model(input_ids=rows).logits[:, :5]

    alone, stacked = run([42], 5), run(SEEDS, 7)[2:4]
    torch.testing.assert_close(alone, stacked, atol=SAME, rtol=SAME)
    module.stack.route(["seed_42"])
    assert not torch.allclose(alone, module.model(input_ids=ROWS[:2, :5]).logits, atol=1e-2)


def test_dropout_keeps_the_expected_share_and_scales_it(tiny_llama):
    module = built(tiny_llama, 42, lora_dropout=0.25)
    layer = next(iter(module.stack.layers.values()))
    weights = LoRAFactors(torch.eye(32)[None], torch.eye(32)[None])
    module.stack.load("seed_42", {layer.stack_path: weights})
    module.stack.route(["seed_42"], dropout_keys=[(42,)])
    x = torch.ones(1, 400, 32)
    added = layer(x) - layer.base_layer(x)
    assert torch.minimum(added.abs(), (added - 4 / 3).abs()).max() < 1e-5
    assert added.mean().item() == pytest.approx(1.0, abs=0.02)


def test_routing_an_unknown_adapter_names_the_known_ones(tiny_llama):
    with pytest.raises(KeyError, match="no adapter 'fused'.*seed_11"):
        built(tiny_llama, 11).stack.route(["fused"])


def test_rows_that_do_not_divide_are_refused(tiny_llama):
    module = built(tiny_llama, *SEEDS)
    module.stack.route(["seed_11", "seed_42"])
    with pytest.raises(RuntimeError, match="5 rows cannot be split"):
        module.model(input_ids=ROWS[:5])


def test_a_route_first_used_in_inference_mode_can_be_trained(tiny_llama):
    module = built(tiny_llama, 1, 2)
    module.stack.route(["seed_1", "seed_2"])
    ids = torch.arange(12).view(2, 6)
    with torch.inference_mode():
        module.model(input_ids=ids)
    module.model(input_ids=ids).logits.sum().backward()
    assert module.stack.parameters("seed_2")[0].grad.abs().sum() > 0


@pytest.mark.usefixtures("float64")
@torch.no_grad()
def test_a_frozen_stack_computes_the_same_and_thaws(tiny_llama):
    module = built(tiny_llama, *SEEDS)
    names = ["seed_202", None, "seed_11"]
    module.stack.route(names)
    wanted = module.model(input_ids=ROWS).logits
    with module.stack.frozen():
        for _ in range(2):
            torch.testing.assert_close(module.model(input_ids=ROWS).logits, wanted, atol=0, rtol=0)
        module.stack.route(["seed_42"])
        torch.testing.assert_close(
            module.model(input_ids=ROWS).logits, peft_logits(module, "seed_42", ROWS), atol=SAME, rtol=SAME
        )
    for parameter in module.stack.parameters("seed_42"):
        parameter.mul_(2)
    torch.testing.assert_close(
        module.model(input_ids=ROWS).logits, peft_logits(module, "seed_42", ROWS), atol=SAME, rtol=SAME
    )


def test_dora_s_norms_take_no_matrix_of_the_size_of_a_weight():
    """200,000 rows and columns, 160 GB; W = u v^T is known by its products alone, and the norms by hand."""
    size, g = 200_000, torch.Generator().manual_seed(0)
    u, v, a, b, m = (torch.randn(size, generator=g, dtype=torch.float64) for _ in range(5))
    scale = 2.5
    norms = (u**2 * v.dot(v) + 2 * scale * u * b * v.dot(a) + scale**2 * b**2 * a.dot(a)).sqrt()

    class Layer:
        stack_norms = (u.abs() * v.norm()).float()
        base_layer = staticmethod(lambda x: (x @ v.float())[:, None] * u.float())
        get_base_layer = staticmethod(lambda: torch.nn.Linear(1, 1, bias=False))

    block = Block(a.float()[None], b.float()[:, None], scale, m.float())
    gain = _dora_gain(Layer, [block, None], block.A)
    assert gain.shape == (2, 1, size)
    torch.testing.assert_close(gain[0, 0].double(), m / norms - 1, atol=1e-3, rtol=1e-3)
    assert not gain[1].any()
    # And of their merge, where blocks of rows are read, the first block.
    stack = LoRAFactors(torch.stack([a, a])[:, None], scale * torch.stack([b, -b])[..., None])
    updates = dora_updates(stack, torch.stack([m, m]), lambda start, stop: u[start:stop, None] * v)
    first = next(updates.blocks())
    rows = first.shape[1]
    assert rows <= 4
    wanted = (m / norms)[:rows, None] * (u[:rows, None] * v + scale * b[:rows, None] * a) - u[:rows, None] * v
    torch.testing.assert_close(first[0], wanted)
