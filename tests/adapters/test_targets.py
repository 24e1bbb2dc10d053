"""Which layers a configuration adapts, against PEFT's own rule."""

from __future__ import annotations

import json

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from seedlora.adapters.adapter import CONFIG_NAME, AdapterError
from seedlora.adapters.reading import read_adapter
from seedlora.adapters.targets import Targets
from tests.helpers.adapter_folders import SEVEN, save_adapter

PATHS = [
    *(f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 1, 10) for name in "qv"),
    *("model.layers.1.mlp.experts.0.up_proj", "lm_head", "model.embed_tokens", "transformer.h.1.attn.c_attn"),
    *("layers.1.q_proj", "h.1.q_proj", "1.q_proj"),
]
CONFIGS = [
    {"target_modules": ["q_proj", "c_attn"]},
    {"target_modules": ["proj", "model.layers.0.self_attn.q_proj"]},
    {"target_modules": r".*\.(q|v)_proj"},
    {"target_modules": r"q_proj"},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.1\..*"},
    {"target_modules": ["q_proj", "up_proj", "c_attn"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj", "up_proj", "c_attn"], "layers_to_transform": 1, "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": [0, 1], "layers_pattern": ["h", "layers"]},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_rule_is_peft_s(config, tmp_path):
    peft, ours = LoraConfig(**config), Targets.read(tmp_path, config)
    # PEFT answers with a match, a flag, or an object of its own for what is excluded.
    wanted = {
        path: bool(found := check_target_module_exists(peft, path)) and "Excluded" not in repr(type(found))
        for path in PATHS
    }
    assert {path: ours.key_leaving_out(path) is None for path in PATHS} == wanted


@pytest.mark.parametrize(
    ("edit", "key"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, "target_modules"),
        ({"target_modules": r".*\.q_proj"}, "target_modules"),
        ({"exclude_modules": ["v_proj"]}, "exclude_modules"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
    ],
)
def test_factors_that_peft_would_not_load_are_refused(edit, key, tmp_path):
    save_adapter(tmp_path, r=2, target_modules=SEVEN)
    file = tmp_path / CONFIG_NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | edit))
    with pytest.raises(AdapterError, match=f"which {key} of adapter_config.json leaves out"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    "edit",
    [
        {"target_modules": 7},
        {"target_modules": {"q_proj": 2}},
        {"target_modules": [1]},
        {"exclude_modules": True},
        {"layers_to_transform": ["0"]},
        {"layers_to_transform": True},
        {"layers_pattern": [7]},
    ],
    ids=str,
)
def test_entries_of_a_wrong_type_are_refused(edit, tmp_path):
    save_adapter(tmp_path, r=2, target_modules=SEVEN)
    file = tmp_path / CONFIG_NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | edit))
    with pytest.raises(AdapterError, match=f"{next(iter(edit))} is .* is needed"):
        read_adapter(tmp_path)


def test_an_expression_that_might_take_for_ever_is_not_asked(tmp_path):
    assert Targets.read(tmp_path, {"target_modules": "(a+)+$"}).key_leaving_out("a" * 60 + "b") is None
