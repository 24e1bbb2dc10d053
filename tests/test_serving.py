"""Zeros where servers want a module that nobody trained."""

import torch
from safetensors.torch import save_file

from seedlora.factors import LoRAFactors
from seedlora.serving import base_shapes, complete


def layer(d, k, r=2):
    return LoRAFactors(torch.ones(1, r, k), torch.ones(1, d, r))


def test_groups_and_layers_without_the_base():
    layers = {
        "m.layers.0.attn.q_proj": layer(8, 8),
        "m.layers.0.attn.v_proj": layer(4, 8),
        "m.layers.1.mlp.up_proj": layer(12, 8),
        "lm_head": layer(20, 8),
    }
    full, unknown = complete(layers)
    assert not unknown
    names = [f"m.layers.{i}.{m}" for i in (0, 1) for m in ("attn.k_proj", "attn.q_proj", "attn.v_proj")]
    names += [f"m.layers.{i}.mlp.{m}" for i in (0, 1) for m in ("gate_proj", "up_proj")]
    assert list(full) == sorted([*names, "lm_head"])
    assert full["m.layers.1.attn.k_proj"].shape == (4, 8)
    assert full["m.layers.0.mlp.gate_proj"].shape == (12, 8)
    for path, factors in full.items():
        assert torch.equal(factors.dense(), layers[path].dense() if path in layers else torch.zeros(1, *factors.shape))


def test_an_unknown_shape_is_said():
    assert complete({"m.layers.0.attn.q_proj": layer(8, 8)})[1] == [
        "m.layers.0.attn.k_proj",
        "m.layers.0.attn.v_proj",
    ]


def test_the_base_knows_all_layers(tmp_path):
    weights = {}
    for i in range(3):
        weights |= {f"m.layers.{i}.attn.{m}.weight": torch.ones(d, 8) for m, d in (("q_proj", 8), ("k_proj", 4))}
    save_file(weights | {"m.norm.weight": torch.ones(8)}, tmp_path / "model.safetensors")
    shapes = base_shapes(tmp_path)
    full, unknown = complete({"m.layers.1.attn.q_proj": layer(8, 8)}, shapes)
    assert not unknown
    assert list(full) == sorted(key.removesuffix(".weight") for key in weights)
    assert full["m.layers.2.attn.k_proj"].shape == (4, 8)


def test_no_base_no_shapes(tmp_path):
    assert base_shapes(tmp_path) is None
    assert base_shapes("") is None
    assert base_shapes("owner/name") is None


def test_a_base_with_other_names_tells_nothing(tmp_path):
    save_file({"other.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    layers = {"m.layers.0.mlp.up_proj": layer(12, 8)}
    assert set(complete(layers, base_shapes(tmp_path))[0]) == set(complete(layers)[0])
