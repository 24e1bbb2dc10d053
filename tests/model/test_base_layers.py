"""A base model's layers from its own classes, without its weights."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from seedlora.model import base_layers as module
from seedlora.model.base_layers import base_layers
from tests.helpers.adapter_folders import small_gpt2, small_llama


@pytest.mark.parametrize("make", [small_llama, small_gpt2])
def test_layers_are_those_that_transformers_loads(make, tmp_path):
    make().save_pretrained(tmp_path)
    known = base_layers(tmp_path, "CAUSAL_LM")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    for path, shape in known.shapes.items():
        layer = model.get_submodule(path)
        stored = tuple(layer.weight.shape)
        assert (path in known.transposed) == isinstance(layer, Conv1D)
        assert shape == (stored if hasattr(layer, "in_features") else stored[::-1])
    assert "lm_head" not in known.transposed


def test_the_task_says_which_head_there_is(tmp_path):
    small_llama().save_pretrained(tmp_path)
    assert "score" in base_layers(tmp_path, "SEQ_CLS").shapes
    assert "lm_head" in base_layers(tmp_path, None).shapes
    assert hasattr(AutoModelForSequenceClassification.from_pretrained(tmp_path), "score")


def test_what_is_not_known_is_none(tmp_path):
    assert base_layers(tmp_path) is None
    assert base_layers("owner/name") is None
    assert base_layers(tmp_path / "nowhere") is None
    for content in ("{", "[]", "{}", '{"model_type": "none such"}'):
        (tmp_path / "config.json").write_text(content)
        assert base_layers(tmp_path) is None


def test_code_of_a_folder_is_not_run(tmp_path):
    """Nor is anybody asked whether it should be."""
    (tmp_path / "made.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\n")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "made.Own", "AutoModelForCausalLM": "made.OwnModel"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert base_layers(tmp_path, "CAUSAL_LM") is None
    assert not (tmp_path / "run").exists()


def test_what_was_described_before_is_read_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SEEDLORA_CACHE", str(tmp_path / "cache"))
    small_gpt2().save_pretrained(tmp_path / "one")
    first = module._known.__wrapped__(tmp_path / "one", 0, "CAUSAL_LM")
    (kept,) = (tmp_path / "cache" / "base_layers").iterdir()
    whole = kept.read_text()
    for broken in ("", "[]", "{}", whole[:-9], whole.replace("[", "[7,")):
        kept.write_text(broken)
        assert module._known.__wrapped__(tmp_path / "one", 0, "CAUSAL_LM").shapes == first.shapes
        assert kept.read_text() == whole
    monkeypatch.setattr(module, "_describe", lambda *_: None)
    again = module._known.__wrapped__(tmp_path / "one", 0, "CAUSAL_LM")
    assert (again.shapes, again.transposed) == (first.shapes, first.transposed)
    assert again.modules.find("h.0.attn.c_attn") == first.modules.find("h.0.attn.c_attn") is not None
    assert module._known.__wrapped__(tmp_path / "one", 0, "SEQ_CLS") is None
    config = (tmp_path / "one" / "config.json").read_text()
    (tmp_path / "one" / "config.json").write_text(config.replace('"n_layer": 2', '"n_layer": 3'))
    assert module._known.__wrapped__(tmp_path / "one", 0, "CAUSAL_LM") is None


def test_without_a_place_for_a_cache_layers_are_described_each_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SEEDLORA_CACHE", str(tmp_path / "file" / "below"))
    small_llama().save_pretrained(tmp_path / "one")
    assert "lm_head" in base_layers(tmp_path / "one", "CAUSAL_LM").shapes
