"""Shapes of base models for benchmarks, and folders with random models of these shapes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from seedlora.model.loading import fast_dtype


class Shape(NamedTuple):
    """Hold the sizes of a Llama, or of a Qwen2, whose queries, keys and values have biases."""

    hidden: int
    feed_forward: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int
    tied: bool
    kind: str = "llama"


SHAPES = {
    "llama6": Shape(512, 1408, 6, 8, 8, 49152, tied=True),
    "smollm2_random": Shape(576, 1536, 30, 9, 3, 49152, tied=True),
    "wide4": Shape(1024, 2816, 4, 16, 16, 40960, tied=False),
    "wide6": Shape(1536, 4096, 6, 24, 24, 40960, tied=False),
    "qwen10": Shape(640, 1728, 10, 10, 2, 65536, tied=True, kind="qwen2"),
    "tiny": Shape(64, 176, 2, 4, 2, 49152, tied=True),
    "llama2_7b": Shape(4096, 11008, 32, 32, 32, 32000, tied=False),
}


def save_tokenizer(folder: Path) -> None:
    """Save a tokenizer of bytes: a run looks at the one of its model, whatever it is trained on."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tokens[0]).save_pretrained(folder)


def config_folder(name: str, root: Path) -> Path:
    """A folder with the configuration of a shape and a tokenizer, without weights."""
    from transformers import LlamaConfig, Qwen2Config

    shape, folder = SHAPES[name], root / "-".join(map(str, SHAPES[name]))
    if not (folder / "config.json").is_file():
        (Qwen2Config if shape.kind == "qwen2" else LlamaConfig)(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.feed_forward,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_heads,
            tie_word_embeddings=shape.tied,
        ).save_pretrained(folder)
        save_tokenizer(folder)
    return folder


def random_model(name: str, root: Path) -> str:
    """A folder with a model of random weights, made where a GPU is on it; kept for the next time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = config_folder(name, root)
    if not any(folder.glob("*.safetensors")):
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=fast_dtype())
        model.save_pretrained(folder)
    return str(folder)
