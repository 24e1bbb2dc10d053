"""Names of one layer in several versions of a model's class."""

from __future__ import annotations

import pytest

from seedlora.model.layer_names import LayerNames

GEMMA = [
    "model.language_model.layers.0.self_attn.q_proj",
    "model.vision_tower.encoder.layers.0.self_attn.q_proj",
    "lm_head",
]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("model.language_model.layers.0.self_attn.q_proj", GEMMA[0]),
        ("language_model.model.layers.0.self_attn.q_proj", GEMMA[0]),
        ("model.layers.0.self_attn.q_proj", GEMMA[0]),
        ("layers.0.self_attn.q_proj", GEMMA[0]),
        ("vision_tower.vision_model.encoder.layers.0.self_attn.q_proj", GEMMA[1]),
        ("language_model.lm_head", GEMMA[2]),
        ("model.layers.1.self_attn.q_proj", None),
        ("encoder.layers.0.self_attn.q_proj", None),
        ("model.layers.0.self_attn", None),
    ],
)
def test_a_layer_is_found_by_what_it_is_called_elsewhere(path, name):
    assert LayerNames(GEMMA).find(path) == name


def test_what_could_be_two_is_none():
    towers = LayerNames(["text_model.encoder.layers.0.fc1", "vision_model.encoder.layers.0.fc1"])
    assert towers.find("encoder.layers.0.fc1") is None
    assert towers.find("text_model.encoder.layers.0.fc1") == "text_model.encoder.layers.0.fc1"
