"""Fixtures of all tests: the device, a cache of their own, float64, a tiny Llama."""

from __future__ import annotations

import os
from collections.abc import Iterator

# The tests of test_gpu.py alone are for a GPU; what others compare is worked out on the CPU. Before torch is imported.
if os.environ.get("SEEDLORA_TEST_DEVICE", "cpu") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# One thread unless another number is asked for: the tensors are tiny. The processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from seedlora.utils.wheel_files import cache_folder
from tests.helpers.models import save_tiny_llama
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
