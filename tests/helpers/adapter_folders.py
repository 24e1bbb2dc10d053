"""Adapters as PEFT saves them: of tiny random models, with random factors."""

from __future__ import annotations

import json

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
KEY = f"base_model.model.{Q}.lora_A.weight"
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def small_llama(*, layers: int = 2, key_value_heads: int = 1, bias: bool = False) -> LlamaForCausalLM:
    """Make the same random Llama each time, of 16 dimensions."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=key_value_heads,
        tie_word_embeddings=False,
        attention_bias=bias,
        mlp_bias=bias,
    )
    return LlamaForCausalLM(config)


def small_gpt2(*, layers: int = 2) -> GPT2LMHeadModel:
    """Make the same random GPT-2 each time, whose layers are Conv1D."""
    torch.manual_seed(0)
    size = {"vocab_size": 32, "n_embd": 16, "n_layer": layers, "n_head": 2, "n_positions": 8}
    return GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0))


#: What is read without the base model: who makes the model, and PEFT's configuration.
PLAIN_KINDS = {
    "alpha is not r": (small_llama, {"r": 4, "lora_alpha": 10, "target_modules": SEVEN}),
    "rslora": (small_llama, {"r": 4, "lora_alpha": 10, "use_rslora": True, "target_modules": SEVEN}),
    "patterns": (
        small_llama,
        {
            "r": 4,
            "lora_alpha": 10,
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
            "alpha_pattern": {"v_proj": 3, r".*\.0\.mlp\.up_proj": 7},
            "target_modules": SEVEN,
        },
    ),
    "rslora and patterns": (
        small_llama,
        {
            "r": 4,
            "lora_alpha": 10,
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"q_proj": 3},
            "target_modules": SEVEN,
        },
    ),
    "partial": (
        small_llama,
        {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    ),
    "all linear": (small_llama, {"r": 2, "lora_alpha": 6, "target_modules": "all-linear"}),
    "head and embedding": (
        small_llama,
        {"r": 2, "lora_alpha": 6, "target_modules": ["lm_head", "embed_tokens", "q_proj"]},
    ),
    "conv1d": (
        small_gpt2,
        {"r": 2, "lora_alpha": 6, "target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True},
    ),
    "orthogonal": (small_llama, {"r": 2, "lora_alpha": 6, "init_lora_weights": "orthogonal", "target_modules": SEVEN}),
}


def save_adapter(path, make=small_llama, seed=1, dtype=torch.float32, **config):
    """Save a PEFT model with random factors; return the model."""
    model = get_peft_model(make(), LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
    model.save_pretrained(path)
    return model


def merged_weights(model):
    """Return every weight of a model after its adapters are merged into it, by name."""
    return {key: value.float() for key, value in model.merge_and_unload().state_dict().items()}


def dense_updates(folders, path):
    """Return ``B @ A * lora_alpha / r`` from the files, without our reader, of shape (N, D, K)."""
    updates = []
    for folder in folders:
        tensors = load_file(folder / "adapter_model.safetensors")
        config = json.loads((folder / "adapter_config.json").read_text())
        a, b = (tensors[f"base_model.model.{path}.lora_{x}.weight"].double() for x in "AB")
        updates.append(b @ a * config["lora_alpha"] / config["r"])
    return torch.stack(updates)
