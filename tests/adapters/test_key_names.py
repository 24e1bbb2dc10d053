"""Names of wrappers within the keys of an adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from seedlora.adapters.adapter import WEIGHTS_NAME, AdapterError
from seedlora.adapters.key_names import plain_keys
from seedlora.adapters.reading import read_adapter
from seedlora.merge.adapter_folders import merge_folders
from tests.helpers.adapter_folders import merged_weights, save_adapter, small_llama

PLAIN = "base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight"
WRAPPED = {
    "compiled": "base_model.model._orig_mod.model.layers.{}.self_attn.q_proj.lora_A.weight",
    "a compiled layer": "base_model.model.model.layers.{}._orig_mod.self_attn.q_proj.lora_A.weight",
    "DDP around PEFT": "module.base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight",
    "DDP twice": "module.module.base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight",
    "PEFT around DDP": "base_model.model.module.model.layers.{}.self_attn.q_proj.lora_A.weight",
    "PEFT twice": "base_model.model.base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight",
    "FSDP": "_fsdp_wrapped_module.base_model.model.model.layers.{}._fsdp_wrapped_module.self_attn.q_proj.lora_A.weight",
    "checkpointing": "base_model.model.model.layers.{}._checkpoint_wrapped_module.self_attn.q_proj.lora_A.weight",
    "Fabric": "_forward_module.base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight",
    "DDP around compiled": "module._orig_mod.base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight",
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers_are_taken_out(kind):
    keys = [WRAPPED[kind].format(i) for i in range(3)]
    assert list(plain_keys(keys, Path("f")).values()) == [PLAIN.format(i) for i in range(3)]


def test_plain_names_stay():
    keys = [PLAIN.format(0), "base_model.model.module.1.lora_A.weight", "base_model.model.lm_head.lora_A.weight"]
    assert plain_keys(keys, Path("f")) == {key: key for key in keys}


def test_two_keys_of_one_layer_are_refused():
    keys = [PLAIN.format(0), WRAPPED["compiled"].format(0)]
    with pytest.raises(AdapterError, match="both name base_model.model.model.layers.0.* without wrappers"):
        plain_keys(keys, Path("f"))


@pytest.mark.parametrize("kind", ["compiled", "DDP around PEFT", "PEFT twice", "FSDP"])
def test_the_merge_changes_the_model_that_it_is_loaded_into(kind, tmp_path):
    model = save_adapter(tmp_path / "a", r=2, lora_alpha=6, target_modules=["q_proj"])
    plain = read_adapter(tmp_path / "a").layers
    file = tmp_path / "a" / WEIGHTS_NAME
    wrapped = {
        WRAPPED[kind].format(key.split(".")[4]).replace("lora_A", key.split(".")[-2]): tensor
        for key, tensor in load_file(file).items()
    }
    save_file(wrapped, file)
    assert read_adapter(tmp_path / "a").renamed
    assert set(read_adapter(tmp_path / "a").layers) == set(plain)
    merge_folders([tmp_path / "a"], tmp_path / "out", method="soup")
    found = merged_weights(PeftModel.from_pretrained(small_llama(), tmp_path / "out"))
    wanted = merged_weights(model)
    before = small_llama().state_dict()
    assert not torch.allclose(
        wanted["model.layers.0.self_attn.q_proj.weight"], before["model.layers.0.self_attn.q_proj.weight"]
    )
    for key, weight in wanted.items():
        torch.testing.assert_close(found[key], weight)


def test_a_name_of_an_adapter_within_keys_is_refused(tmp_path):
    """PEFT keeps its adapter's name in memory alone: a state dict that somebody saved themselves still has it."""
    save_adapter(tmp_path, r=2, lora_alpha=6, target_modules=["q_proj"])
    file = tmp_path / WEIGHTS_NAME
    save_file({key.replace(".weight", ".default.weight"): t for key, t in load_file(file).items()}, file)
    with pytest.raises(AdapterError, match="lora_A.default.weight.*save it with PEFT's save_pretrained"):
        read_adapter(tmp_path)
