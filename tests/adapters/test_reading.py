"""PEFT writes, we read; broken folders end in AdapterError."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from seedlora.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME, AdapterError, locate
from seedlora.adapters.reading import read_adapter
from seedlora.merge.adapter_folders import merge_folders
from seedlora.model.weight_files import WeightFiles
from tests.helpers.adapter_folders import KEY, PLAIN_KINDS, merged_weights, save_adapter


@pytest.mark.parametrize("kind", PLAIN_KINDS)
def test_updates_are_what_peft_adds(kind, tmp_path):
    make, config = PLAIN_KINDS[kind]
    model = save_adapter(tmp_path / "a", make, **config)
    adapter = read_adapter(tmp_path / "a")
    before, after = make().state_dict(), merged_weights(model)
    changed = {key for key in after if not torch.equal(before[key], after[key])}
    assert {f"{path}.weight" for path in adapter.layers} == changed
    for path, factors in adapter.layers.items():
        found = factors.dense()[0]
        wanted = after[f"{path}.weight"] - before[f"{path}.weight"]
        flipped = path in adapter.embeddings or adapter.fan_in_fan_out
        assert torch.allclose(found.T if flipped else found, wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora is set; DoRA is not plain LoRA.*python -m seedlora merge merges it"),
        ({"init_lora_weights": "pissa"}, "'pissa', which changes the base weights; python -m seedlora merge computes"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights; .*convert the adapter after training"),
        ({"init_lora_weights": "corda"}, "'corda', which changes the base weights; .*convert"),
        ({"init_lora_weights": "loftq"}, "'loftq', which changes the base weights"),
        ({"lora_bias": True}, "lora_bias adds a vector"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set; modules_to_save holds full weights"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"lora_alpha": "16"}, "lora_alpha is '16', a number is needed"),
        ({"lora_alpha": float("nan")}, "lora_alpha is 'nan'"),
        ({"r": 0}, "r is '0', a positive whole number"),
        ({"r": 3}, "has rank 2, but adapter_config.json says 3"),
        ({"rank_pattern": {"q_proj": 4}}, "has rank 2, but adapter_config.json says 4"),
        ({"rank_pattern": [1]}, "rank_pattern is"),
        ({"alpha_pattern": {"(": 4}}, "is no regex"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path is '3', text is needed"),
        ({"revision": ["v1"]}, "revision is .*, text is needed"),
        ({"task_type": "CHESS"}, "task_type is 'CHESS', one of CAUSAL_LM, SEQ_CLS"),
        ({"task_type": ["SEQ_CLS"]}, "task_type is .*, one of CAUSAL_LM"),
    ],
)
def test_configurations_that_are_not_plain_lora_are_refused(config, message, broken):
    with pytest.raises(AdapterError, match=message):
        read_adapter(broken(config=config))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(KEY), "has no .lora_A.weight beside it"),
        (lambda t: t.update({KEY: t[KEY] * float("nan")}), "holds NaN or infinity"),
        (lambda t: t.update({KEY: t[KEY][:0]}), "is empty"),
        (lambda t: t.update({KEY: t[KEY][:1]}), r"has shape \(1, 16\) and its B \(16, 2\)"),
        (lambda t: t.update({KEY: t[KEY].int()}), "is torch.int32"),
        (lambda t: t.update({KEY: t[KEY][0].clone()}), "has shape"),
        (lambda t: t.update({"other": torch.ones(2)}), "'other' is no factor"),
        (lambda t: t.update({KEY.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(2)}), "is no factor"),
        (lambda t: t.update({"base_model.model.lora_A.weight": torch.ones(2, 2)}), "is no factor|has no"),
        (lambda t: t.update({KEY.replace(".weight", ".default.weight"): t.pop(KEY)}), "PEFT's own keys begin with"),
        (
            lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2, 2)}),
            "but a full weight, as PEFT saves it of a resized vocabulary; add 'lm_head' to modules_to_save",
        ),
        (lambda t: t.clear(), "holds no LoRA factors"),
    ],
)
def test_broken_tensors_are_refused(edit, message, broken):
    with pytest.raises(AdapterError, match=message):
        read_adapter(broken(tensors=edit))


def test_a_scaling_that_overflows_is_refused(broken):
    def half(tensors):
        for key in tensors:
            tensors[key] = tensors[key].half()

    folder = broken(config={"lora_alpha": 2**21}, tensors=half)
    with pytest.raises(AdapterError, match=r"overflows torch.float16"):
        read_adapter(folder)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_scaling_is_applied_before_any_rounding(use_rslora, tmp_path):
    """Factors in bfloat16, whose scaling is no power of two, give an update in float32 as float64 would have it."""
    save_adapter(
        tmp_path / "a", dtype=torch.bfloat16, r=2, lora_alpha=6, use_rslora=use_rslora, target_modules=["q_proj"]
    )
    stored = load_file(tmp_path / "a" / WEIGHTS_NAME)
    adapter = read_adapter(tmp_path / "a")
    assert adapter.stored_dtype == torch.bfloat16
    for path, factors in adapter.layers.items():
        a, b = (stored[f"base_model.model.{path}.lora_{part}.weight"].double() for part in "AB")
        wanted = b @ a * (6 / 2**0.5 if use_rslora else 3)
        assert float((factors.dense()[0].double() - wanted).norm() / wanted.norm()) < 1e-6
    merge_folders([tmp_path / "a"], tmp_path / "plain", method="soup")
    assert {tensor.dtype for tensor in load_file(tmp_path / "plain" / WEIGHTS_NAME).values()} == {torch.bfloat16}


def test_pickles_and_missing_folders_are_refused(good, tmp_path):
    shutil.copy(good / CONFIG_NAME, tmp_path)
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(
        AdapterError, match=r"pickled weights .* not read; there is adapter_model.bin: load it with PEFT"
    ):
        read_adapter(tmp_path)
    with pytest.raises(AdapterError, match=r"has no adapter_config.json"):
        read_adapter(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match=r"is no folder; give a PEFT adapter folder or a hub id"):
        locate(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match=r"is no folder"):
        locate(good / CONFIG_NAME)


def test_bases_that_are_broken_are_named(base_and_pissa, tmp_path):
    shutil.copytree(base_and_pissa / "base", tmp_path / "base")
    for name, content, said in [
        ("config.json", [], "config.json holds no JSON object"),
        ("model.safetensors.index.json", {}, "index.json has no weight_map from keys to files"),
        ("model.safetensors.index.json", {"weight_map": {"a": "gone"}}, "gone"),
    ]:
        (tmp_path / "base" / name).write_text(json.dumps(content))
        with pytest.raises(AdapterError, match=f"a is PiSSA: its update depends on .* cannot be read: .*{said}"):
            read_adapter(base_and_pissa / "a", base=WeightFiles(tmp_path / "base"))
        shutil.copy(base_and_pissa / "base" / name, tmp_path / "base" / name)
    read_adapter(base_and_pissa / "a", base=WeightFiles(tmp_path / "base"))


def test_a_folder_of_checkpoints_names_them(tmp_path):
    for step in (9, 10):
        save_adapter(tmp_path / f"checkpoint-{step}", r=2, lora_alpha=2, target_modules=["q_proj"])
    wanted = (
        f"it has no adapter_config.json; give one of those in it: {tmp_path}/checkpoint-10, {tmp_path}/checkpoint-9"
    )
    with pytest.raises(AdapterError, match=re.escape(wanted)):
        read_adapter(tmp_path)
