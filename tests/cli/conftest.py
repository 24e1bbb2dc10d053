"""A folder of its own for each test of a command, adapters, and a base model."""

from __future__ import annotations

import pytest

from tests.helpers.adapter_folders import SEVEN, save_adapter, small_llama


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """What a test leaves in the working directory lies in a folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Three adapters; not to be edited."""
    root = tmp_path_factory.mktemp("adapters")
    for seed in (11, 42, 202):
        save_adapter(root / str(seed), seed=seed, r=2, lora_alpha=6, target_modules=SEVEN)
    return [str(root / str(seed)) for seed in (11, 42, 202)]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Their base model, in shards."""
    folder = tmp_path_factory.mktemp("base")
    small_llama().save_pretrained(folder, max_shard_size="4KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder
