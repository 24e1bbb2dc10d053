"""Base models from folders."""

from __future__ import annotations

import pytest
import torch

from seedlora.model import loading as base_model


@pytest.mark.parametrize(("name", "message"), [("./nowhere", "does not exist"), ("/a/b", "does not exist")])
def test_a_missing_folder_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        base_model.resolve_base_model(name)


def test_dropout_of_the_base_model_is_off(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32)).save_pretrained(tmp_path)
    model = base_model.load_model(str(tmp_path), dtype=torch.float32)
    assert {layer.p for layer in model.modules() if isinstance(layer, torch.nn.Dropout)} == {0.0}
