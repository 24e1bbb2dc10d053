"""Adapters merged into base models of many families, against PEFT's own merge of each."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from seedlora.merge.adapter_folders import merge_folders
from seedlora.merge.into_base import merge_into_base
from tests.helpers.adapter_kinds import distance, move_trained

#: Of all but GPT-2, GPT-NeoX and Falcon, whose configurations have other names.
SIZE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
HEADS = {"head_dim": 8}
GEMMA_3 = SIZE | HEADS | {"sliding_window": 4}
VISION = {
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TOKENS = {"mm_tokens_per_image": 4, "image_token_index": 37, "boi_token_index": 38, "eoi_token_index": 39}
GPT2 = {
    "vocab_size": 40,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
FALCON = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "bos_token_id": 0}
ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
#: Name of transformers' configuration, what it says, and the layers that are adapted.
FAMILIES = {
    "llama, untied": ("LlamaConfig", SIZE | UNTIED, "all-linear"),
    "llama, tied, bias": ("LlamaConfig", SIZE | TIED | {"attention_bias": True, "mlp_bias": True}, "all-linear"),
    "llama, untied, head": ("LlamaConfig", SIZE | UNTIED, [*ATTENTION, "lm_head"]),
    "mistral": ("MistralConfig", SIZE | UNTIED, "all-linear"),
    "qwen2, tied, bias": ("Qwen2Config", SIZE | TIED, "all-linear"),
    "qwen2, untied": ("Qwen2Config", SIZE | UNTIED, "all-linear"),
    "qwen3, tied": ("Qwen3Config", SIZE | HEADS | TIED, "all-linear"),
    "qwen3, untied": ("Qwen3Config", SIZE | HEADS | UNTIED, "all-linear"),
    "gemma2": ("Gemma2Config", SIZE | HEADS, "all-linear"),
    "gemma3, text": ("Gemma3TextConfig", GEMMA_3, "all-linear"),
    "gemma3, vision": ("Gemma3Config", {"text_config": GEMMA_3, "vision_config": VISION, **TOKENS}, ATTENTION[:3]),
    "gemma3, its text": (
        "Gemma3Config",
        {"text_config": GEMMA_3, "vision_config": VISION, **TOKENS},
        r".*language_model.*\.(q|up|down)_proj",
    ),
    "phi3": ("Phi3Config", SIZE | UNTIED, "all-linear"),
    "gpt2, tied": ("GPT2Config", GPT2 | {"eos_token_id": 0} | TIED, "all-linear"),
    "gpt2, untied, head": ("GPT2Config", GPT2 | {"eos_token_id": 0} | UNTIED, ["c_attn", "c_proj", "lm_head"]),
    "gpt_neox": ("GPTNeoXConfig", {k: v for k, v in SIZE.items() if "key" not in k} | UNTIED, "all-linear"),
    "gpt_neox, tied": ("GPTNeoXConfig", {k: v for k, v in SIZE.items() if "key" not in k} | TIED, "all-linear"),
    "falcon": ("FalconConfig", FALCON | {"eos_token_id": 0}, "all-linear"),
    "falcon, bias": ("FalconConfig", FALCON | {"eos_token_id": 0, "bias": True, "alibi": True}, "all-linear"),
    "opt": ("OPTConfig", SIZE | {"ffn_dim": 24, "word_embed_proj_dim": 8, "max_position_embeddings": 16}, "all-linear"),
    "bloom": ("BloomConfig", {"vocab_size": 40, "hidden_size": 16, "n_layer": 2, "n_head": 2} | ENDS, "all-linear"),
    "gptj": ("GPTJConfig", GPT2 | {"rotary_dim": 4, "eos_token_id": 0} | UNTIED, "all-linear"),
    "gpt_bigcode": ("GPTBigCodeConfig", GPT2 | ENDS, "all-linear"),
    "phi": ("PhiConfig", SIZE | UNTIED, "all-linear"),
    "deepseek_v3": (
        "DeepseekV3Config",
        SIZE | UNTIED | LATENT | {"num_key_value_heads": 2, "n_routed_experts": 2, "num_experts_per_tok": 1},
        ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
    ),
    "mixtral": ("MixtralConfig", SIZE | UNTIED | {"num_local_experts": 2}, ATTENTION),
}


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    """The folders of a random base model and of two adapters, and the mean of what PEFT makes of each."""
    name, entries, targets = FAMILIES[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**entries))
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.data.normal_(std=0.1)
    model.save_pretrained(tmp_path / "base")
    before = {key: weight.clone() for key, weight in load(tmp_path / "base").state_dict().items()}
    wanted = dict.fromkeys(before, 0)
    for seed in (1, 2):
        config = LoraConfig(r=2, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM")
        adapted = get_peft_model(load(tmp_path / "base"), config)
        move_trained(adapted, seed)
        adapted.save_pretrained(tmp_path / str(seed))
        merged = adapted.merge_and_unload().state_dict()
        wanted = {key: wanted[key] + (merged[key] - before[key]) / 2 for key in before}
    return tmp_path, before, wanted


def test_merges_are_what_peft_merges(family):
    """Into the base, and as an adapter that PEFT loads over it."""
    folder, before, wanted = family
    merge_into_base([folder / "1", folder / "2"], folder / "base", folder / "whole", method="soup")
    whole = load(folder / "whole").state_dict()
    assert {key for key in before if not torch.equal(whole[key], before[key])} == {
        k for k, v in wanted.items() if v.any()
    }
    assert distance({key: whole[key] - before[key] for key in before}, wanted) < 1e-5
    merge_folders([folder / "1", folder / "2"], folder / "fused", method="soup", base=folder / "base")
    fused = PeftModel.from_pretrained(load(folder / "base"), folder / "fused").merge_and_unload().state_dict()
    assert distance({key: fused[key] - before[key] for key in before}, wanted) < 1e-5
