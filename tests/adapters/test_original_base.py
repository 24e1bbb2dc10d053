"""Adapters that are read with the base model they were trained on: DoRA, PiSSA, OLoRA."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from seedlora.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME, AdapterError
from seedlora.adapters.reading import read_adapter
from seedlora.cli.main import main
from seedlora.merge.adapter_folders import merge_folders
from seedlora.merge.into_base import merge_into_base
from seedlora.model.weight_files import WeightFiles
from tests.helpers.adapter_folders import small_gpt2
from tests.helpers.adapter_kinds import KINDS, SEEDS, load_base, move_trained, one_layer_llama


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_updates_are_those_of_peft_s_own_conversion(kind, adapters_of, tmp_path):
    """The factors of ``path_initial_model_for_weight_conversion``: rank 2r, the same update."""
    case = adapters_of(kind)
    config = LoraConfig(**KINDS[kind], task_type="CAUSAL_LM")
    model = get_peft_model(load_base(case.base), config)
    initial = {name: p.clone() for name, p in model.named_parameters() if "lora_" in name}
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = config.init_lora_weights
    move_trained(model, SEEDS[0])
    assert any(not torch.equal(p, initial[name]) for name, p in model.named_parameters() if name in initial)
    model.peft_config["default"].init_lora_weights = KINDS[kind]["init_lora_weights"]
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    wanted = read_adapter(tmp_path / "plain")
    found = read_adapter(case.folders[0], base=WeightFiles(case.base))
    assert found.layers.keys() == wanted.layers.keys()
    for path, factors in wanted.layers.items():
        assert found.layers[path].rank == factors.rank == 2 * 4
        torch.testing.assert_close(found.layers[path].dense(), factors.dense(), atol=1e-5, rtol=1e-4)


def test_starts_are_subtracted_as_they_were(adapters_of, tmp_path):
    """The start of an adapter in bfloat16 was in float32, and is not rounded again."""
    case = adapters_of("pissa")
    shutil.copytree(case.folders[0], tmp_path / "a")
    tensors = {key: tensor.bfloat16() for key, tensor in load_file(case.folders[0] / WEIGHTS_NAME).items()}
    save_file(tensors, tmp_path / "a" / WEIGHTS_NAME)
    start = get_peft_model(load_base(case.base), LoraConfig(**KINDS["pissa"], task_type="CAUSAL_LM")).state_dict()
    found = read_adapter(tmp_path / "a", base=WeightFiles(case.base))
    for path, factors in found.layers.items():
        key = f"base_model.model.{path}.lora_{{}}"
        a, b = (tensors[key.format(x) + ".weight"].double() for x in "AB")
        a_0, b_0 = (start[key.format(x) + ".default.weight"].double() for x in "AB")
        wanted = (b @ a - b_0 @ a_0) * 10 / 4
        assert float((factors.to(torch.float64).dense()[0] - wanted).norm() / wanted.norm()) < 1e-6


def test_starts_are_not_computed_for_adapters_that_do_not_fit(adapters_of, edited_copy, tmp_path, monkeypatch):
    folder = edited_copy("pissa", task_type="SEQ_CLS")

    def start(*args, **kwargs):
        raise AssertionError("the work was begun")

    monkeypatch.setattr("seedlora.adapters.original_base._initial_factors", start)
    for merge in (merge_folders, lambda *args: merge_into_base(args[0], adapters_of("pissa").base, args[1])):
        with pytest.raises(AdapterError, match="task_type is CAUSAL_LM in .* and SEQ_CLS in"):
            merge([adapters_of("pissa").folders[0], folder], tmp_path / "out")


def one_sentence(words, capsys):
    assert main(words) == 2
    found = capsys.readouterr()
    assert found.err.count("\n") == 1
    assert found.out == ""
    return found.err


@pytest.mark.parametrize("kind", ["dora", "pissa"])
def test_a_base_that_is_not_there_is_named(kind, edited_copy, adapters_of, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    folder = edited_copy(kind, base_model_name_or_path=str(tmp_path / "gone"))
    capsys.readouterr()  # bars of the models' saving
    said = one_sentence(["merge", str(folder), *out], capsys)
    assert "its update depends on the base weights, which cannot be read" in said
    assert "gone is no folder" in said
    assert "--base MODEL" in said
    assert main(["merge", str(folder), *out, "--base", str(adapters_of(kind).base), "--method", "soup"]) == 0
    capsys.readouterr()
    (tmp_path / "copy" / CONFIG_NAME).write_text(
        json.dumps(json.loads((folder / CONFIG_NAME).read_text()) | {"base_model_name_or_path": None})
    )
    assert "names no base model, whose weights" in one_sentence(["inspect", str(folder)], capsys)


@pytest.mark.parametrize("kind", ["dora", "pissa"])
def test_another_base_is_refused(kind, adapters_of, tmp_path, capsys):
    config = LlamaConfig(**(one_layer_llama().config.to_dict() | {"intermediate_size": 20}))
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    small_gpt2(layers=1).save_pretrained(tmp_path / "gpt2")
    words = ["merge", *map(str, adapters_of(kind).folders), "--out", str(tmp_path / "out"), "--base"]
    capsys.readouterr()  # bars of the models' saving
    assert "it is not the base model of this adapter" in one_sentence([*words, str(tmp_path / "other")], capsys)
    assert "is no layer of the base model" in one_sentence([*words, str(tmp_path / "gpt2")], capsys)
    assert not (tmp_path / "out").exists()
