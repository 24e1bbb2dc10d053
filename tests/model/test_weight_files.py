"""The files of a base model, as from_pretrained takes them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from seedlora.adapters.adapter import WEIGHTS_NAME, AdapterError
from seedlora.adapters.reading import read_adapter
from seedlora.adapters.servers import serving_problems
from seedlora.merge.into_base import merge_into_base
from seedlora.model.weight_files import WeightFiles, companions
from tests.helpers.adapter_folders import save_adapter, small_llama
from tests.helpers.models import save_tiny_llama

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
KEY = "model.embed_tokens.weight"


@pytest.fixture
def resaved(tmp_path):
    """A base model that was saved in shards, and then, with other weights, in one file."""
    folder = tmp_path / "base"
    small_llama().save_pretrained(folder, max_shard_size="4KB")
    old = {file.name: file.read_bytes() for file in folder.glob("model-*")}
    index = (folder / "model.safetensors.index.json").read_bytes()
    newer = small_llama()
    newer.model.embed_tokens.weight.data.fill_(0.5)
    newer.save_pretrained(folder)
    for name, data in {**old, "model.safetensors.index.json": index}.items():
        (folder / name).write_bytes(data)
    return folder


def test_one_file_comes_before_the_index_of_an_older_save(resaved, tmp_path):
    """As in from_pretrained; and the result has no index of files that it has not."""
    truth = AutoModelForCausalLM.from_pretrained(resaved).state_dict()[KEY]
    assert torch.equal(truth, torch.full_like(truth, 0.5))
    assert torch.equal(WeightFiles(resaved).weight(KEY), truth)
    save_adapter(tmp_path / "a", r=2, lora_alpha=6, target_modules=["q_proj"])
    merge_into_base([tmp_path / "a"], resaved, tmp_path / "out", method="soup")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()[KEY], truth)
    assert not list((tmp_path / "out").glob("*.index.json"))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1


def test_what_is_not_of_the_model_is_left_behind(tmp_path):
    base = tmp_path / "base"
    save_tiny_llama(base, seed=0)
    save_adapter(tmp_path / "a", lambda: AutoModelForCausalLM.from_pretrained(base), r=2, target_modules=["q_proj"])
    shutil.copy(tmp_path / "a" / "adapter_config.json", base)
    (base / "pytorch_model.bin.index.json").write_text("{}")
    (base / "optimizer.bin").write_bytes(b"0")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ messages }} {{ tools }}"}
    tokenizer.save_pretrained(base)
    merge_into_base([tmp_path / "a"], base, tmp_path / "out", method="soup")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert not names & {"adapter_config.json", "pytorch_model.bin.index.json", "optimizer.bin"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not [key for key in model.state_dict() if "lora" in key]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
    assert "generation_config.json" in names


def test_companions_of_many_tokenizers_are_known(tmp_path):
    wanted = ["config.json", "merges.txt", "qwen.tiktoken", "source.spm", "spiece.model", "tokenizer.model"]
    (tmp_path / "additional_chat_templates").mkdir()
    wanted += ["additional_chat_templates/rag.jinja", "chat_template.jinja", "preprocessor_config.json"]
    for name in [*wanted, "README.md", "model.gguf"]:
        (tmp_path / name).write_text("")
    assert sorted(str(file.relative_to(tmp_path)) for file in companions(tmp_path)) == sorted(wanted)


def test_pointers_of_git_lfs_are_called_so(tmp_path):
    save_adapter(tmp_path / "a", r=2, lora_alpha=6, target_modules=["q_proj"])
    small_llama().save_pretrained(tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_text(POINTER)
    said = "is a Git LFS pointer and no weights: run git lfs pull"
    with pytest.raises(ValueError, match=f"model.safetensors {said}"):
        merge_into_base([tmp_path / "a"], tmp_path / "base", tmp_path / "out")
    (tmp_path / "a" / WEIGHTS_NAME).write_text(POINTER)
    with pytest.raises(AdapterError, match=f"{WEIGHTS_NAME} {said}"):
        read_adapter(tmp_path / "a")
    with pytest.raises(ValueError, match=said):
        serving_problems(tmp_path / "a")


@pytest.mark.parametrize("damage", ["cut", "missing", "directory", "outside", "absolute"])
def test_damaged_shards_are_named(damage, tmp_path):
    folder = tmp_path / "base"
    small_llama().save_pretrained(folder, max_shard_size="4KB")
    first, index = sorted(folder.glob("model-*"))[0], folder / "model.safetensors.index.json"
    if damage == "cut":
        first.write_bytes(first.read_bytes()[:-9])
    elif damage in ("missing", "directory"):
        first.unlink()
    if damage == "directory":
        first.mkdir()
    if damage in ("outside", "absolute"):
        shutil.copy(first, tmp_path)
        away = str(tmp_path / first.name) if damage == "absolute" else f"../{first.name}"
        index.write_text(index.read_text().replace(first.name, away))
    with pytest.raises(ValueError, match=first.name):
        _ = WeightFiles(folder).files


def test_a_folder_of_other_weights_says_which(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"there is pytorch_model.bin, which is not read here"):
        _ = WeightFiles(tmp_path).files


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("model.language_model.layers.0.q_proj", "language_model.model.layers.0.q_proj.weight"),
        ("model.layers.0.q_proj", "language_model.model.layers.0.q_proj.weight"),
        ("model.vision_tower.encoder.layers.0.q_proj", "vision_tower.vision_model.encoder.layers.0.q_proj.weight"),
        ("lm_head", "language_model.lm_head.weight"),
    ],
)
def test_layers_are_found_under_other_names(path, key, tmp_path):
    keys = ["language_model.model.layers.0.q_proj", "vision_tower.vision_model.encoder.layers.0.q_proj"]
    tensors = {f"{name}.weight": torch.ones(2, 2) for name in (*keys, "language_model.lm_head")}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    assert WeightFiles(tmp_path).key(path) == key


def test_a_head_that_is_missing_is_a_tied_one_only_where_heads_are_tied(tmp_path):
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    for tied in (True, False):
        (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
        with pytest.raises(ValueError, match="has no weight for the adapted layer lm_head") as caught:
            WeightFiles(tmp_path).key("lm_head")
        assert ("tied head" in str(caught.value)) == tied
    with pytest.raises(ValueError, match="for the adapted layer score$"):
        WeightFiles(tmp_path).key("score")
