"""Adapters under the base model's own names, each layer laid out as the base stores it."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from seedlora.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME, AdapterError
from seedlora.adapters.reading import read_adapter
from seedlora.merge.adapter_folders import merge_folders
from seedlora.merge.into_base import merge_into_base
from seedlora.model.weight_files import WeightFiles
from tests.helpers.adapter_folders import merged_weights, save_adapter, small_llama
from tests.helpers.adapter_kinds import distance, load_base, move_trained


def untied_gpt2():
    """A GPT-2 whose head is a Linear of its own, beside layers that are Conv1D; all square but c_attn and the MLP's."""
    torch.manual_seed(0)
    size = {"vocab_size": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8}
    return GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False))


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}])
@pytest.mark.parametrize("targets", [["attn.c_proj", "lm_head"], ["c_attn", "c_fc", "lm_head"]])
@pytest.mark.parametrize("said", [True, False])
def test_conv1d_beside_linear_is_what_peft_merges(targets, more, said, tmp_path):
    """PEFT writes the fan_in_fan_out of the layer that it wrapped last; both answers mean the same model."""
    untied_gpt2().save_pretrained(tmp_path / "base")
    base = {key: weight.clone() for key, weight in load_base(tmp_path / "base").state_dict().items()}
    model = get_peft_model(
        load_base(tmp_path / "base"),
        LoraConfig(r=2, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **more),
    )
    move_trained(model, 1)
    model.save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / CONFIG_NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fan_in_fan_out": said}))
    merged = merged_weights(model)
    wanted = {key: merged[key] - base[key] for key in base}
    adapter = read_adapter(tmp_path / "a", base=WeightFiles(tmp_path / "base"))
    assert adapter.transposed == {path for path in adapter.layers if "lm_head" not in path}
    merge_into_base([tmp_path / "a"], tmp_path / "base", tmp_path / "whole", method="soup")
    whole = load_base(tmp_path / "whole").state_dict()
    assert distance({key: whole[key] - base[key] for key in base}, wanted) < 1e-5
    merge_folders([tmp_path / "a"], tmp_path / "out", method="soup", options={"rank": 16}, base=tmp_path / "base")
    fused = merged_weights(PeftModel.from_pretrained(load_base(tmp_path / "base"), tmp_path / "out"))
    assert distance({key: fused[key] - base[key] for key in base}, wanted) < 1e-4


def renamed(folder, change):
    """Give the tensors of an adapter other names."""
    file = folder / WEIGHTS_NAME
    save_file({change(key): tensor for key, tensor in load_file(file).items()}, file)


def test_a_layer_that_the_base_has_not_is_refused(tmp_path):
    small_llama().save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "a", r=2, lora_alpha=6, target_modules=["q_proj"])
    renamed(tmp_path / "a", lambda key: key.replace("self_attn", "attention"))
    said = (
        r"'model.layers.0.attention.q_proj' \(2 of 2 layers\) is no layer of the base model .*, which has model.layers"
    )
    with pytest.raises(AdapterError, match=said):
        merge_folders([tmp_path / "a"], tmp_path / "out", method="soup", base=tmp_path / "base")
    assert not (tmp_path / "out").exists()


def test_an_update_of_another_shape_is_refused(tmp_path):
    small_llama(key_value_heads=2).save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "a", r=2, lora_alpha=6, target_modules=["k_proj"])
    with pytest.raises(AdapterError, match=r"the update of .*k_proj' is \(8, 16\), and the layer .* is \(16, 16\)"):
        merge_folders([tmp_path / "a"], tmp_path / "out", method="soup", base=tmp_path / "base")


def test_other_names_of_the_same_layers_become_the_base_s(tmp_path):
    """Those of a model with a vision tower, of which the language model alone is left."""
    small_llama().save_pretrained(tmp_path / "base")
    model = save_adapter(tmp_path / "a", r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    renamed(tmp_path / "a", lambda key: key.replace("model.model.layers", "model.language_model.model.layers"))
    merge_folders([tmp_path / "a"], tmp_path / "out", method="soup", base=tmp_path / "base")
    found = merged_weights(PeftModel.from_pretrained(small_llama(), tmp_path / "out"))
    for key, weight in merged_weights(model).items():
        torch.testing.assert_close(found[key], weight)


def test_two_names_of_one_layer_are_refused(tmp_path):
    small_llama().save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "a", r=2, lora_alpha=6, target_modules=["q_proj"])
    file = tmp_path / "a" / WEIGHTS_NAME
    tensors = load_file(file)
    twice = {key.replace("model.model.l", "model.language_model.l"): t.clone() for key, t in tensors.items()}
    save_file(tensors | twice, file)
    with pytest.raises(AdapterError, match=r"both mean model.layers.0.self_attn.q_proj of the base model"):
        merge_folders([tmp_path / "a"], tmp_path / "out", method="soup", base=tmp_path / "base")


def test_without_the_base_s_classes_shapes_tell(tmp_path):
    untied_gpt2().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "config.json").unlink()
    save_adapter(tmp_path / "a", untied_gpt2, r=2, lora_alpha=6, target_modules=["c_attn", "c_fc"])
    file = tmp_path / "a" / CONFIG_NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fan_in_fan_out": False}))
    adapter = read_adapter(tmp_path / "a", base=WeightFiles(tmp_path / "base"))
    assert adapter.transposed == set(adapter.layers)
