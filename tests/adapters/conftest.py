"""An adapter that is read with its base model."""

from __future__ import annotations

import pytest

from tests.helpers.adapter_folders import save_adapter, small_llama


@pytest.fixture(scope="session")
def base_and_pissa(tmp_path_factory):
    """A base model in shards, and an adapter that cannot be read without it."""
    folder = tmp_path_factory.mktemp("pissa")
    small_llama().save_pretrained(folder / "base", max_shard_size="4KB")
    save_adapter(folder / "a", r=2, init_lora_weights="pissa", target_modules=["q_proj"])
    return folder
