"""What is written without PEFT is what PEFT would write."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig

from seedlora.adapters.adapter import CONFIG_NAME
from seedlora.adapters.config_keys import LORA_DEFAULTS
from seedlora.adapters.writing import universal_config, write_adapter
from seedlora.updates.factors import LoRAFactors

LAYERS = {
    f"m.layers.0.{name}": LoRAFactors(torch.ones(1, 3, 8), torch.ones(1, 6, 3)) for name in ("mlp.0", "up_proj", "0")
}


def test_the_defaults_are_those_of_peft():
    found = LoraConfig().to_dict()
    del found["peft_version"]
    assert dict(LORA_DEFAULTS) == found


@pytest.mark.parametrize(
    ("here", "in_peft"),
    [
        ({}, {}),
        ({"task_type": None, "auto_mapping": {"base_model_class": "A"}, "revision": "v2"}, {}),
        ({"fan_in_fan_out": True, "lora_bias": True}, {}),
        ({"modules_to_save": {"lm_head", "embed_tokens"}}, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ({"use_dora": True}, {}),
    ],
)
def test_the_universal_configuration_is_written_as_peft_would(here, in_peft, tmp_path):
    said = {"task_type": "CAUSAL_LM", **here, **in_peft}
    config = LoraConfig(
        r=3, lora_alpha=3, target_modules=["mlp.0", "up_proj", "layers.0.0"], base_model_name_or_path="base", **said
    )
    for name, either in (("ours", universal_config(LAYERS, base_model="base", **here)), ("peft", config)):
        write_adapter(tmp_path / name, LAYERS, either)
    config.save_pretrained(tmp_path / "saved")
    ours, peft, saved = ((tmp_path / name / CONFIG_NAME).read_text() for name in ("ours", "peft", "saved"))
    assert ours == peft
    assert {**json.loads(saved), "inference_mode": True, "target_modules": json.loads(ours)["target_modules"]} == (
        json.loads(ours)
    )
