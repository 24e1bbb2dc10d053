"""Tiny random models of the architectures that are written as GGUF, and adapters on them, as PEFT saves them."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
}
CONFIGS: dict[str, type[PretrainedConfig]] = {
    "Llama": LlamaConfig,
    "Mistral": MistralConfig,
    "Qwen2": Qwen2Config,
    "Qwen3": Qwen3Config,
    "Gemma2": Gemma2Config,
    "Gemma3": Gemma3TextConfig,
    "Phi3": Phi3Config,
}
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODULES = {"Phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}


def save_model(folder: Path, kind: str = "Llama", **shape: object) -> str:
    """Write a random model of a kind; its folder comes back."""
    config = CONFIGS[kind](**{**SHAPE, **({"head_dim": 8} if kind.startswith("Gemma") else {}), **shape})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


def save_adapter(folder: Path, base: str, *, std: float = 0.3, seed: int = 1, **options: object) -> Path:
    """Write an adapter with random factors, on all linear layers unless told otherwise."""
    config = AutoModelForCausalLM.from_pretrained(base).config
    kind = config.architectures[0].removesuffix("ForCausalLM")
    options = {"r": 4, "lora_alpha": 4, "target_modules": MODULES.get(kind, SEVEN), "task_type": "CAUSAL_LM"} | options
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=std, generator=generator)
    model.save_pretrained(folder)
    return folder
