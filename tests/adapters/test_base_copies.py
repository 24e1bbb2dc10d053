"""Base weights that PEFT saved beside the factors of an embedding or a head, against the base model's own."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from seedlora.adapters.adapter import WEIGHTS_NAME, AdapterError
from seedlora.merge.adapter_folders import merge_folders
from seedlora.merge.into_base import merge_into_base
from tests.helpers.adapter_folders import save_adapter, small_llama


@pytest.fixture
def folders(tmp_path):
    """A base model, and two adapters of its embedding or head; returns what changes the copies that are in these."""

    def change(layer, edit):
        small_llama().save_pretrained(tmp_path / "base")
        for seed in (1, 2):
            save_adapter(tmp_path / str(seed), seed=seed, r=2, target_modules=[layer, "q_proj"])
            tensors = load_file(file := tmp_path / str(seed) / WEIGHTS_NAME)
            (key,) = (key for key in tensors if key.endswith("base_layer.weight"))
            tensors[key] = edit(tensors[key])
            save_file(tensors, file)
        return [tmp_path / "1", tmp_path / "2"], tmp_path / "base"

    return change


@pytest.mark.parametrize("layer", ["embed_tokens", "lm_head"])
def test_a_copy_that_is_not_the_base_s_is_refused(layer, folders, tmp_path):
    """PEFT loads it over the base: what it changes would be lost."""

    def one_row(copy):
        copy[3, 5] += 0.01
        return copy

    adapters, base = folders(layer, one_row)
    for merge in (
        lambda: merge_folders(adapters, tmp_path / "out", method="soup", base=base),
        lambda: merge_into_base(adapters, base, tmp_path / "out", method="soup"),
    ):
        with pytest.raises(AdapterError, match=rf"{layer}\.base_layer\.weight' differs .* in 1 of 32 rows"):
            merge()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_copy_that_is_rounded_is_the_base_s(dtype, folders, tmp_path):
    adapters, base = folders("embed_tokens", lambda copy: copy.to(dtype))
    merge_folders(adapters, tmp_path / "out", method="soup", base=base)
    assert (tmp_path / "out" / WEIGHTS_NAME).is_file()
