"""Tiny models, modules and data, made on the spot: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from seedlora.datamodules import ReasoningGym
from seedlora.training.module import SeedLoRAModule
from seedlora.training.replicas import FitSettings, Replica

EOS = "<eos>"
SEEDS = (11, 42, 202)
#: Two rows of seven tokens for each of three adapters.
ROWS = torch.arange(3 * 2 * 7).view(6, 7) % 257
#: Kinds of adapters, and how the base model below each is stored.
KINDS = [
    ("lora", "none"),
    ("rslora", "none"),
    ("dora", "none"),
    ("pissa", "none"),
    ("lora", "nf4"),
    ("lora", "int8"),
    ("dora", "nf4"),
    ("dora", "int8"),
    ("pissa", "nf4"),
    ("loftq", "nf4"),
]
#: Models of other families than Llama.
FAMILIES = {
    "mistral": (MistralConfig, {"num_key_value_heads": 2, "sliding_window": 4}),
    "qwen2": (Qwen2Config, {"num_key_value_heads": 2}),
    "gemma": (GemmaConfig, {"num_key_value_heads": 1, "head_dim": 8}),
    "gpt2": (GPT2Config, {}),
}
#: Every weight is trained.
FULL = {"adapter": "full", "learning_rate": 2e-4}


def save_tiny_llama(folder: Path, *, seed: int, **shape: int | bool) -> None:
    """Save a random Llama of two layers, or of another shape, with a byte-level tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([EOS, *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS).save_pretrained(folder)
    tiny = {
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = LlamaConfig(**{**tiny, **shape}, bos_token_id=None, eos_token_id=0, pad_token_id=None)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)


def make_module(base_model: str, **options: object) -> SeedLoRAModule:
    """Make a module in float32 with adapters of rank 4."""
    small = {} if options.get("adapter") == "full" else {"r": 4, "lora_alpha": 12}
    return SeedLoRAModule(base_model, **{"dtype": "float32", **small, **options})


def make_data(**options: object) -> ReasoningGym:
    """Make a data module of 24 training rows: 12 steps of two."""
    small = {"num_train": 24, "num_val": 8, "num_test": 12, "batch_size": 2, "eval_batch_size": 5}
    return ReasoningGym(**{**small, **options})


def replicas(*seeds: int) -> tuple[Replica, ...]:
    """Return one replica per seed, which decides its start and its order."""
    return tuple(Replica(f"seed_{seed}", seed, seed) for seed in seeds)


def built(base_model: str, *seeds: int, **options: object) -> SeedLoRAModule:
    """Return a module that is set up, with B made non-zero so that its adapters do something."""
    module = make_module(base_model, **options)
    module.prepare_fit(FitSettings(replicas(*seeds)))
    module.setup("fit")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    return module


def moved(base_model: str, *seeds: int, **options: object) -> SeedLoRAModule:
    """Return a module whose adapters, magnitudes included, are away from where they start."""
    module = built(base_model, *seeds, **options)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.mul_(1 + 0.2 * noise) if "magnitude" in name else parameter.data.add_(0.05 * noise)
    return module


def moved_in_all(base_model: str, *seeds: int, **options: object) -> SeedLoRAModule:
    """Return a module with everything that is trained away from where it starts, full weights included."""
    module = make_module(base_model, **options)
    module.prepare_fit(FitSettings(replicas(*seeds)))
    module.options.check()
    module.setup("fit")
    generator = torch.Generator().manual_seed(1)
    for replica in module.replicas:
        for parameter in module.stack.parameters(replica.name):
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module
