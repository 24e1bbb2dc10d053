"""Which adapters belong together, and how they are stacked."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from seedlora.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME, AdapterError
from seedlora.adapters.reading import read_adapter
from seedlora.merge.adapter_folders import merge_folders
from seedlora.merge.inputs import read_adapters, stack_adapters
from tests.helpers.adapter_folders import KEY, Q, save_adapter, small_llama


def test_adapters_that_do_not_belong_together_are_refused(good, broken, tmp_path):
    with pytest.raises(AdapterError, match=r"was given twice"):
        read_adapters([good, good / "." / ""])
    folder = broken(config={"base_model_name_or_path": "other"})
    with pytest.raises(AdapterError, match=r"belongs to base model '', .* to 'other'"):
        stack_adapters(read_adapters([good, folder]))
    broken(config={"base_model_name_or_path": "", "revision": "v1"})
    with pytest.raises(AdapterError, match=r"revision is main in .* and v1 in"):
        stack_adapters(read_adapters([good, folder]))
    assert merge_folders([folder], tmp_path / "v1", method="soup")
    assert json.loads((tmp_path / "v1" / CONFIG_NAME).read_text())["revision"] == "v1"
    broken(config={"revision": "main"})
    assert stack_adapters(read_adapters([good, folder]))
    with pytest.raises(AdapterError, match=r"task_type is None in .* and SEQ_CLS in"):
        stack_adapters(read_adapters([good, broken(config={"base_model_name_or_path": "", "task_type": "SEQ_CLS"})]))
    save_adapter(tmp_path / "k", r=2, lora_alpha=6, target_modules=["q_proj", "k_proj"])
    with pytest.raises(AdapterError, match=r"adapt different layers: only .*k_proj"):
        stack_adapters(read_adapters([good, tmp_path / "k"]))
    folder = broken(config={"task_type": None}, tensors=lambda t: t.update({KEY: torch.ones(2, 20)}))
    with pytest.raises(AdapterError) as caught:
        stack_adapters(read_adapters([good, folder]))
    assert str(caught.value) == f"{Q} has shape (16, 16) in {good} and (16, 20) in {folder}"
    save_adapter(tmp_path / "w", r=2, lora_alpha=6, fan_in_fan_out=True, target_modules=["q_proj", "v_proj"])
    config = json.loads((tmp_path / "w" / CONFIG_NAME).read_text()) | {"fan_in_fan_out": True}
    (tmp_path / "w" / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"fan_in_fan_out is False in .* and True in"):
        stack_adapters(read_adapters([good, tmp_path / "w"]))


def test_one_base_model_by_several_names_is_one(tmp_path):
    small_llama().save_pretrained(tmp_path / "base")
    (tmp_path / "link").symlink_to(tmp_path / "base", target_is_directory=True)
    names = ["base", "link", "base/../base/", "other"]
    for i, name in enumerate(names):
        save_adapter(tmp_path / str(i), seed=i, r=2, target_modules=["q_proj"])
        file = tmp_path / str(i) / CONFIG_NAME
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": f"{tmp_path}/{name}"}))
    assert stack_adapters(read_adapters([tmp_path / str(i) for i in range(3)]))
    with pytest.raises(AdapterError, match="belongs to base model"):
        stack_adapters(read_adapters([tmp_path / "0", tmp_path / "3"]))


def test_different_ranks_and_alphas_are_stacked(tmp_path):
    save_adapter(tmp_path / "1", r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    save_adapter(tmp_path / "2", r=5, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "v_proj"])
    adapters = read_adapters([tmp_path / "1", tmp_path / "2"])
    stack = stack_adapters(adapters)[Q]
    assert stack.rank == 5
    for found, adapter in zip(stack.dense(), adapters.values(), strict=True):
        assert torch.allclose(found, adapter.layers[Q].dense()[0])


def test_resized_vocabularies_are_not_mixed(tmp_path):
    for seed in (1, 2):
        save_adapter(tmp_path / str(seed), seed=seed, r=2, target_modules=["embed_tokens", "q_proj"])
    file = tmp_path / "2" / WEIGHTS_NAME
    tensors = load_file(file)
    tensors["base_model.model.model.embed_tokens.base_layer.weight"] += 1
    save_file(tensors, file)
    with pytest.raises(AdapterError, match=r"embed_tokens has different base weights"):
        stack_adapters(read_adapters([tmp_path / "1", tmp_path / "2"]))


def test_kinds_are_not_mixed(adapters_of, tmp_path):
    pair = [adapters_of("lora").folders[0], adapters_of("dora").folders[0]]
    for folder in pair:  # the same base, as far as their names say
        shutil.copytree(folder, tmp_path / folder.parent.name)
    pair = [tmp_path / folder.parent.name for folder in pair]
    for folder in pair:
        file = folder / CONFIG_NAME
        config = json.loads(file.read_text()) | {"base_model_name_or_path": str(adapters_of("dora").base)}
        file.write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="is DoRA, of .* make plain LoRA of it first"):
        merge_folders(pair, tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "said"), [("lora_bias", "only .* has lora_bias"), ("modules_to_save", "only .* has lm_head")]
)
def test_what_only_one_adapter_has_is_refused(kind, said, edited_copy, adapters_of, tmp_path):
    base = {"base_model_name_or_path": str(adapters_of(kind).base)}
    with pytest.raises(AdapterError, match=said):
        merge_folders([adapters_of(kind).folders[0], edited_copy("lora", **base)], tmp_path / "out")


@pytest.mark.parametrize("first", [True, False])
def test_loftq_is_not_merged_with_adapters_of_the_original_base(first, adapters_of, loftq, tmp_path):
    pair = [loftq, adapters_of("lora").folders[0]][:: 1 if first else -1]
    with pytest.raises(AdapterError, match=r"copy belongs on the one in nf4 alone|copy on the one in nf4 alone"):
        merge_folders(pair, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (loftq / "base.json").write_text('["nf4"]')
    with pytest.raises(AdapterError, match=r"base.json: .* is no record of a quantization"):
        read_adapter(loftq)


def test_modules_of_different_shapes_are_named_with_both(adapters_of, edited_copy, tmp_path):
    key = "base_model.model.lm_head.weight"
    one, other = (
        adapters_of("modules_to_save").folders[0],
        edited_copy("modules_to_save", lambda t: t.update({key: t[key][:31]})),
    )
    with pytest.raises(AdapterError) as caught:
        merge_folders([one, other], tmp_path / "out")
    assert str(caught.value) == f"lm_head.weight has shape (32, 16) in {one} and (31, 16) in {other}"
