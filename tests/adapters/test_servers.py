"""Zeros where servers want a module that nobody trained."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from seedlora.adapters.servers import NOT_KNOWN, SERVERS, add_zero_updates, base_shapes, serving_problems
from seedlora.adapters.writing import universal_config, write_adapter
from seedlora.merge.adapter_folders import merge_folders
from seedlora.updates.factors import LoRAFactors


def layer(d, k, r=2):
    return LoRAFactors(torch.ones(1, r, k), torch.ones(1, d, r))


def test_groups_and_layers_are_completed_without_the_base():
    layers = {
        "m.layers.0.attn.q_proj": layer(8, 8),
        "m.layers.0.attn.v_proj": layer(4, 8),
        "m.layers.1.mlp.up_proj": layer(12, 8),
        "lm_head": layer(20, 8),
    }
    full, unknown = add_zero_updates(layers)
    assert not unknown
    names = [f"m.layers.{i}.{m}" for i in (0, 1) for m in ("attn.k_proj", "attn.q_proj", "attn.v_proj")]
    names += [f"m.layers.{i}.mlp.{m}" for i in (0, 1) for m in ("gate_proj", "up_proj")]
    assert list(full) == sorted([*names, "lm_head"])
    assert full["m.layers.1.attn.k_proj"].shape == (4, 8)
    assert full["m.layers.0.mlp.gate_proj"].shape == (12, 8)
    for path, factors in full.items():
        assert torch.equal(factors.dense(), layers[path].dense() if path in layers else torch.zeros(1, *factors.shape))


def test_an_unknown_shape_is_said():
    assert add_zero_updates({"m.layers.0.attn.q_proj": layer(8, 8)})[1] == [
        "m.layers.0.attn.k_proj",
        "m.layers.0.attn.v_proj",
    ]


def test_the_base_knows_all_layers(tmp_path):
    weights = {}
    for i in range(3):
        weights |= {f"m.layers.{i}.attn.{m}.weight": torch.ones(d, 8) for m, d in (("q_proj", 8), ("k_proj", 4))}
    save_file(weights | {"m.norm.weight": torch.ones(8)}, tmp_path / "model.safetensors")
    shapes = base_shapes(tmp_path)
    full, unknown = add_zero_updates({"m.layers.1.attn.q_proj": layer(8, 8)}, shapes)
    assert not unknown
    assert list(full) == sorted(key.removesuffix(".weight") for key in weights)
    assert full["m.layers.2.attn.k_proj"].shape == (4, 8)


def test_without_a_base_no_shapes_are_known(tmp_path):
    assert base_shapes(tmp_path) is None
    assert base_shapes("") is None
    assert base_shapes("owner/name") is None


def test_a_base_with_other_names_tells_nothing(tmp_path):
    save_file({"other.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    layers = {"m.layers.0.mlp.up_proj": layer(12, 8)}
    assert set(add_zero_updates(layers, base_shapes(tmp_path))[0]) == set(add_zero_updates(layers)[0])


NAMES = [f"m.layers.{i}.attn.{name}" for i in (0, 1) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    save_file({f"{name}.weight": torch.ones(8, 8) for name in NAMES}, path / "model.safetensors")
    return path


def folder(path, layers=None, **changes):
    """An adapter of the universal shape, with changes to its configuration."""
    if layers is None:
        layers = {name: layer(8, 8) for name in NAMES if "o_proj" not in name}
    write_adapter(path, layers, universal_config(layers, base_model="") | changes)
    return path


def test_the_universal_shape_is_served_by_all(base, tmp_path):
    assert serving_problems(folder(tmp_path / "a"), base=base) == {server: [] for server in SERVERS}


def test_without_the_base_some_servers_are_not_known(base, tmp_path, monkeypatch):
    """A snapshot of a hub repository that is on this machine is enough; nothing is downloaded."""
    from huggingface_hub import constants

    layers = {name: layer(8, 8) for name in NAMES if "layers.0" in name}
    path = folder(tmp_path / "a", layers, base_model_name_or_path="somebody/base")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    found = serving_problems(path)
    assert {server for server, reasons in found.items() if not reasons} == {"vLLM", "llama.cpp"}
    assert all(reasons[0].startswith(NOT_KNOWN) for reasons in found.values() if reasons)
    shutil.copytree(base, tmp_path / "hub/models--somebody--base/snapshots/0123")
    (tmp_path / "hub/models--somebody--base/refs").mkdir()
    (tmp_path / "hub/models--somebody--base/refs/main").write_text("0123")
    assert serving_problems(path)["TGI"][0].startswith("m.layers.1.attn.k_proj is missing (4 in all)")
    assert serving_problems(path) == serving_problems(path, base=base)
    merge_folders([path], tmp_path / "out", method="soup")
    assert serving_problems(tmp_path / "out") == {server: [] for server in SERVERS}
    dora = folder(tmp_path / "b", layers, base_model_name_or_path="somebody/else", use_dora=True)
    assert {len(reasons) for reasons in serving_problems(dora).values()} == {1}


ALL = set(SERVERS)


@pytest.mark.parametrize(
    ("changes", "servers", "said"),
    [
        ({"use_dora": True}, ALL, "DoRA"),
        ({"bias": "all"}, ALL, "bias"),
        ({"lora_bias": True}, ALL, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, ALL, "modules_to_save"),
        ({"use_rslora": True}, ALL, "use_rslora"),
        ({"target_modules": ".*_proj"}, ALL, "target_modules"),
        ({"rank_pattern": {"q_proj": 2}}, {"vLLM", "SGLang"}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, {"vLLM", "SGLang", "llama.cpp"}, "alpha_pattern"),
        ({"init_lora_weights": "pissa"}, ALL, "init_lora_weights 'pissa': PiSSA changed the base weights"),
        ({"init_lora_weights": "pissa_niter_4"}, ALL, "init_lora_weights 'pissa_niter_4': PiSSA"),
        ({"init_lora_weights": "olora"}, ALL, "init_lora_weights 'olora': OLoRA"),
        ({"init_lora_weights": "gaussian"}, set(), ""),
        ({"init_lora_weights": "eva"}, set(), ""),
        ({"use_qalora": True}, ALL, "use_qalora"),
    ],
)
def test_what_stands_in_the_way(changes, servers, said, base, tmp_path):
    found = serving_problems(folder(tmp_path / "a", **changes), base=base)
    assert {server for server, reasons in found.items() if reasons} == servers
    assert all(reason.startswith(said) for reasons in found.values() for reason in reasons)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq': LoftQ changed the base weights"),
        ({"init_lora_weights": "corda"}, "init_lora_weights 'corda': CorDA"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights 'lora_ga': LoRA-GA"),
        ({"use_hira": True}, "use_hira: what it changes is not known"),
    ],
)
def test_what_peft_s_own_configuration_does_not_take_alone(changes, said, base, tmp_path):
    path = folder(tmp_path / "a")
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    found = serving_problems(path, base=base)
    assert all(reasons[0].startswith(said) for reasons in found.values())


def test_an_adapter_of_a_quantised_base_is_served_by_none(base, tmp_path):
    path = folder(tmp_path / "a")
    (path / "base.json").write_text('{"quantization": "nf4"}')
    assert all(reasons == ["it belongs on its base model in nf4 alone"] for reasons in serving_problems(path).values())


def test_names_of_wrappers_stand_in_the_way_of_all(base, tmp_path):
    path = folder(tmp_path / "a")
    file = path / "adapter_model.safetensors"
    save_file({key.replace("model.m.", "model._orig_mod.m."): t for key, t in load_file(file).items()}, file)
    assert all("has a wrapper's name in it" in reasons[0] for reasons in serving_problems(path, base=base).values())


def test_ranks_and_missing_modules(base, tmp_path):
    big = serving_problems(folder(tmp_path / "big", {name: layer(8, 8, 513) for name in NAMES}), base=base)
    assert {server for server, reasons in big.items() if reasons} == {"vLLM"}
    assert "rank 513 is over --max-lora-rank 512" in big["vLLM"]
    gap = serving_problems(
        folder(tmp_path / "gap", {name: layer(8, 8) for name in NAMES if name != NAMES[3]}), base=base
    )
    assert {server for server, reasons in gap.items() if reasons} == {"LoRAX", "TGI"}
    assert gap["TGI"][0].startswith("m.layers.0.attn.o_proj is missing (1 in all)")
    group = serving_problems(
        folder(tmp_path / "group", {name: layer(8, 8) for name in NAMES if "v_proj" not in name}), base=base
    )
    assert {server for server, reasons in group.items() if reasons} == {"SGLang"}
    assert "m.layers.0.attn.v_proj is missing (2 in all)" in group["SGLang"][0]


def test_ranks_that_differ_and_keys_of_another_name(tmp_path):
    path = folder(tmp_path / "a")
    tensors = load_file(path / "adapter_model.safetensors")
    key = "base_model.model.m.layers.0.attn.q_proj.lora_{}.weight"
    other = tensors | {key.format("A"): torch.ones(3, 8), key.format("B"): torch.ones(8, 3)}
    save_file(other, path / "adapter_model.safetensors")
    assert all("ranks 2, 3" in reasons[0] for reasons in serving_problems(path).values())
    save_file(
        {key.removeprefix("base_model.model."): t for key, t in tensors.items()}, path / "adapter_model.safetensors"
    )
    assert all("no tensor is named base_model.model" in reasons[0] for reasons in serving_problems(path).values())
    (path / "adapter_config.json").write_text(json.dumps({})[:1])
    with pytest.raises(ValueError, match="is no PEFT adapter folder"):
        serving_problems(path)
    (path / "adapter_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"adapter_config.json holds no JSON object but \[1\]"):
        serving_problems(path)
