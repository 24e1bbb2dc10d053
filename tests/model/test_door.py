"""Base models that cannot be trained are refused in one sentence, before the expensive work."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, Gemma3Config, Gemma3ForConditionalGeneration

from seedlora.cli.main import main
from seedlora.cli.train import main as train
from seedlora.model.loading import (
    BaseModelError,
    check_base,
    check_causal,
    check_token_ids,
    load_config,
    load_model,
    load_tokenizer,
)
from seedlora.model.outline import outline
from seedlora.training.model_options import ModelOptions


@pytest.fixture
def copy(tiny_llama, tmp_path):
    """A copy of a base model, and a function that edits its configuration."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_llama, folder)

    def edit(**entries):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | entries))
        return str(folder)

    return edit


def check(folder):
    check_base(folder, load_config(folder))


def test_a_good_base_passes(tiny_llama):
    check(tiny_llama)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "superquant"])
def test_a_base_that_is_quantised_already(method, copy):
    folder = copy(quantization_config={"quant_method": method, "bits": 4, "group_size": 32})
    with pytest.raises(ValueError, match=f"is quantised already, by {method}; give the model that it was made of"):
        check(folder)
    with pytest.raises(ValueError, match="is quantised already"):
        ModelOptions(folder).check()


def test_an_adapter_beside_the_base(copy, tmp_path):
    folder = copy()
    (tmp_path / "base" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="has an adapter_config.json beside it.*move that file away"):
        check(folder)


def test_weights_that_cannot_be_read(copy, tmp_path):
    folder = copy()
    (tmp_path / "base" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="model.safetensors is a Git LFS pointer"):
        check(folder)


def test_weights_that_are_not_there(copy, tmp_path):
    folder = copy()
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match=r"'.*base' cannot be loaded: .* holds no model.safetensors"):
        check(folder)
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(BaseModelError, match="there is pytorch_model.bin, which is not read here: save it by"):
        check(folder)


def test_weights_that_are_said_to_be_quantised_and_are_not(copy):
    folder = copy(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(BaseModelError, match="weights that are not quantised, and a config.json that says bitsandb"):
        check(folder)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"num_hidden_layers": 3}, r"hold no model.layers.2.input_layernorm.weight \(9 weights in all are missing\)"),
        ({"intermediate_size": 40}, r"down_proj.weight of .* is stored as \(32, 48\), and .* asks for \(32, 40\)"),
    ],
)
def test_weights_that_the_configuration_asks_for_and_the_files_have_not(entries, said, copy, tmp_path, capsys):
    """Transformers makes them up, at random."""
    folder = copy(**entries)
    with pytest.raises(BaseModelError, match=said):
        load_model(folder, dtype=torch.float32)
    words = ["--model.base_model", folder, "--model.dtype", "float32", "--trainer.accelerator", "cpu"]
    assert train([*words, "--ensemble.dirpath", str(tmp_path / "run"), "--data.num_train", "8"]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error:" in line)
    assert "were all files downloaded, and is its config.json its own?" in line


def test_a_model_that_predicts_no_next_token(tmp_path, copy):
    BertConfig(architectures=["BertModel"]).save_pretrained(tmp_path)
    check_causal(load_config(str(tmp_path)))  # transformers has a causal class for BERT
    folder = copy(model_type="vit", architectures=["ViTModel"])
    with pytest.raises(ValueError, match="is ViTModel, which is no causal language model"):
        outline(folder)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"model_type": "none_such"}, "cannot be loaded"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "m.C"}}, "has code of its own, which is not run here"),
        ({"vocab_size": "x"}, "cannot be loaded"),
    ],
)
def test_configurations_that_cannot_be_used(entries, said, copy):
    with pytest.raises(ValueError, match=f"Base model '.*base' .*{said}"):
        load_config(copy(**entries))


@pytest.mark.parametrize("content", ["{", "[]", "\x00"])
def test_files_that_are_broken_are_said_in_a_sentence(content, copy, tmp_path):
    folder = copy()
    (tmp_path / "base" / "tokenizer.json").write_text(content)
    (tmp_path / "base" / "tokenizer_config.json").write_text(content)
    with pytest.raises((ValueError, OSError)) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)
    (tmp_path / "base" / "config.json").write_text(content)
    with pytest.raises((ValueError, OSError)) as caught:
        load_config(folder)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_is_larger_than_the_embedding(copy, tmp_path, capsys):
    check_token_ids(256, 257, "base")
    with pytest.raises(ValueError, match="makes token 257, .* rows for tokens 0 to 256 alone"):
        check_token_ids(257, 257, "base")
    folder = copy()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    words = ["--model.base_model", folder, "--data.style", "chat", "--ensemble.seeds", "[1]", "--data.num_train", "8"]
    words += ["--trainer.accelerator", "cpu", "--ensemble.dirpath", str(tmp_path / "run"), "--data", "ReasoningGym"]
    assert train(["--data", "ReasoningGym", *words[:-2]]) == 2
    assert "makes token 257" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(["preview", "--data", "ReasoningGym", "--model.base_model", folder, "--data.style", "chat"]) == 0
    assert "makes token 257" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    words = ["evaluate", "--base_model", folder, "--task", "chain_sum", "--limit", "1", "--prompt_style", "chat"]
    assert main([*words, "--out", str(tmp_path / "e")]) == 2
    assert "makes token 257" in capsys.readouterr().err


@pytest.fixture
def with_vision(tiny_llama, tmp_path):
    """The folder of a model whose configuration has text_config and a vision tower."""
    folder = tmp_path / "vision"
    text = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 8}
    vision = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text,
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=250,
        boi_token_index=251,
        eoi_token_index=252,
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return str(folder)


def test_the_language_model_alone_is_adapted_where_there_is_a_tower(with_vision):
    options = ModelOptions(with_vision)
    options.check()
    assert options.outline.has_towers
    assert options.outline.vocabulary == 257
    assert len(options.targets) == 14
    assert all(path.startswith("model.language_model.") for path in options.targets)
    assert set(options.lora_config().target_modules) == set(options.targets)
    model = load_model(with_vision, dtype=options.base_dtype)
    assert {name for name, _ in model.named_modules()} >= set(options.targets)


def test_a_model_with_a_vision_tower_trains(with_vision, tmp_path, capsys):
    words = ["--data", "ReasoningGym", "--data.num_train", "8", "--data.num_val", "2", "--data.num_test", "2"]
    words += ["--model.base_model", with_vision, "--model.r", "2", "--ensemble.seeds", "[1,2]", "--merge", "soup"]
    words += [
        "--trainer.accelerator",
        "cpu",
        "--ensemble.budget",
        "full",
        "--trainer.max_epochs",
        "1",
        "--ensemble.dirpath",
        str(tmp_path / "run"),
    ]
    assert train([*words, "--model.dtype", "float32"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "run" / "fused"), "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert len(layers) == 14
    assert all(layer["path"].startswith("model.language_model.") for layer in layers)
    assert all(layer["updates"][0]["norm"] > 0 for layer in layers)
