"""Fixtures of all tests: the device, a cache of their own, float64, tiny models, and adapters in folders."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

# Only tests/devices/test_gpu.py is for a GPU; what others compare is worked out on the CPU. Before torch is imported.
if os.environ.get("SEEDLORA_TEST_DEVICE", "cpu") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# One thread unless another number is asked for: the tensors are tiny. The processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from seedlora.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME
from seedlora.adapters.writing import write_adapter
from seedlora.utils.wheel_files import cache_folder
from tests.helpers.adapter_folders import SEVEN, save_adapter, small_llama
from tests.helpers.adapter_kinds import Made
from tests.helpers.models import FAMILIES, SEEDS, built, save_tiny_llama
from tests.helpers.precision import in_float64

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # torch may have been imported before


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


@pytest.fixture(scope="session")
def families(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model of each family, all with the same tokenizer."""
    root = tmp_path_factory.mktemp("families")
    size = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    for name, (kind, options) in FAMILIES.items():
        inner = {} if name == "gpt2" else {"intermediate_size": 48}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(kind(**size, **inner, **tokens, **options))
            for bias in (p for key, p in model.named_parameters() if key.endswith("bias")):
                bias.data.normal_(std=0.1)  # they start at zero, and would hide a mistake
        model.save_pretrained(root / name)
        AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(root / name)
    return root


@pytest.fixture
def model_of(tiny_llama: str, families: Path) -> Callable[[str], str]:
    """The folder of a tiny random model by its family."""
    return lambda family: tiny_llama if family == "llama" else str(families / family)


@pytest.fixture(scope="session")
def adapters_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Three adapters of a kind, made once."""
    return cache(lambda kind: Made(tmp_path_factory.mktemp("kind"), kind))


@pytest.fixture
def edited_copy(adapters_of: Callable[[str], Made], tmp_path: Path) -> Callable[..., Path]:
    """A copy of an adapter of some kind, and a function that edits its files."""

    def edited(kind, tensors=None, **config):
        folder = tmp_path / "copy"
        shutil.copytree(adapters_of(kind).folders[1], folder)
        if tensors is not None:
            found = load_file(folder / WEIGHTS_NAME)
            tensors(found)
            save_file(found, folder / WEIGHTS_NAME)
        file = folder / CONFIG_NAME
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return folder

    return edited


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that is read without complaint; not to be edited."""
    folder = tmp_path_factory.mktemp("good") / "a"
    save_adapter(folder, r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    return folder


@pytest.fixture
def broken(good: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the good folder, and a function that edits it."""
    folder = tmp_path / "broken"
    shutil.copytree(good, folder)

    def edit(config=None, tensors=None):
        if config is not None:
            file = folder / CONFIG_NAME
            file.write_text(json.dumps(json.loads(file.read_text()) | config))
        if tensors is not None:
            found = load_file(folder / WEIGHTS_NAME)
            tensors(found)
            save_file(found, folder / WEIGHTS_NAME)
        return folder

    return edit


@pytest.fixture
def seed_folders(tiny_llama: str, tmp_path: Path) -> list[Path]:
    """The folders of three adapters of one module."""
    module = built(tiny_llama, *SEEDS)
    for seed in SEEDS:
        write_adapter(
            tmp_path / f"seed_{seed}", module.stack.stored_factors(f"seed_{seed}"), module.options.lora_config()
        )
    return [tmp_path / f"seed_{seed}" for seed in SEEDS]


@pytest.fixture(scope="session")
def plain_folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three adapters with random factors; not to be edited."""
    root = tmp_path_factory.mktemp("adapters")
    for seed in (11, 42, 202):
        save_adapter(root / str(seed), seed=seed, r=2, lora_alpha=6, target_modules=SEVEN)
    return [str(root / str(seed)) for seed in (11, 42, 202)]


@pytest.fixture(scope="session")
def plain_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their base model, in shards."""
    folder = tmp_path_factory.mktemp("base")
    small_llama().save_pretrained(folder, max_shard_size="4KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder
