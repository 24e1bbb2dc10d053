"""A tiny Llama and a tiny tokenizer, made on the spot: nothing is downloaded."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# The tests of test_gpu.py alone are for a GPU; what others compare is worked out on the CPU. Before torch is imported.
if os.environ.get("SEEDLORA_TEST_DEVICE", "cpu") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# One thread unless another number is asked for: the tensors are tiny. The processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from precision import in_float64
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from seedlora.datamodules import ReasoningGym
from seedlora.training.module import SeedLoRAModule
from seedlora.training.replicas import FitSettings, Replica
from seedlora.utils.wheel_files import cache_folder

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # torch may have been imported before

EOS = "<eos>"


@pytest.fixture(scope="session", autouse=True)
def _a_cache_of_our_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is written to the user's cache; the embedded model is there if it was converted before."""
    folder, mine = tmp_path_factory.mktemp("cache"), cache_folder()
    for model in mine.glob("*-bf16-*"):
        (folder / model.name).symlink_to(model, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEEDLORA_CACHE", str(folder))
        yield


@pytest.fixture
def float64() -> Iterator[None]:
    """The test computes in float64."""
    with in_float64():
        yield


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a random Llama of two layers with a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    save_tiny_llama(folder, seed=0)
    return str(folder)


def save_tiny_llama(folder: Path, *, seed: int, **shape: int) -> None:
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


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Inside, the system refuses to write more into a file, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))  # Python ignores the signal, so writes fail
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def make_module(base_model: str, **options: object) -> SeedLoRAModule:
    small = {} if options.get("adapter") == "full" else {"r": 4, "lora_alpha": 12}
    return SeedLoRAModule(base_model, **{"dtype": "float32", **small, **options})


def make_data(**options: object) -> ReasoningGym:
    small = {"num_train": 24, "num_val": 8, "num_test": 12, "batch_size": 2, "eval_batch_size": 5}
    return ReasoningGym(**{**small, **options})


def replicas(*seeds: int) -> tuple[Replica, ...]:
    return tuple(Replica(f"seed_{seed}", seed, seed) for seed in seeds)


def built(base_model: str, *seeds: int, **options: object) -> SeedLoRAModule:
    """A module that is set up, with B made non-zero so that its adapters do something."""
    module = make_module(base_model, **options)
    module.prepare_fit(FitSettings(replicas(*seeds)))
    module.setup("fit")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    return module
