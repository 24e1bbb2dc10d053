"""Adapters merged into a folder, which PEFT loads, against the paper's formula and what PEFT adds."""

from __future__ import annotations

import contextlib
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from seedlora.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME, AdapterError
from seedlora.adapters.reading import read_adapter
from seedlora.cli.main import main
from seedlora.merge.adapter_folders import merge_folders
from seedlora.merge.inputs import stack_adapters
from seedlora.merge.into_base import merge_into_base
from seedlora.merge.layers import merge_stacks
from seedlora.merge.methods.seedlora import seedlora
from seedlora.merge.registry import make_rule
from seedlora.names import FUSION_NAME
from tests.helpers import reference as ref
from tests.helpers.adapter_folders import PLAIN_KINDS, SEVEN, dense_updates, merged_weights, save_adapter, small_llama


def test_the_fused_adapter_is_the_paper_s_formula(seed_folders, tmp_path):
    merge_folders(seed_folders, tmp_path / "fused")
    fused = read_adapter(tmp_path / "fused").layers
    assert len(fused) == 14
    for path, factors in fused.items():
        expected = ref.seedlora(list(dense_updates(seed_folders, path)))
        assert ((factors.dense()[0].double() - expected).norm() / expected.norm()).item() < 1e-6


@torch.no_grad()
def test_peft_loads_the_fused_folder_and_computes_base_plus_the_dense_update(seed_folders, tmp_path, tiny_llama):
    merge_folders(seed_folders, tmp_path / "fused")
    rows = torch.arange(20).view(2, 10)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "fused")(input_ids=rows).logits
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    plain = dense(input_ids=rows).logits
    for path in read_adapter(tmp_path / "fused").layers:
        dense.get_submodule(path).weight += ref.seedlora(list(dense_updates(seed_folders, path))).float()
    torch.testing.assert_close(loaded, dense(input_ids=rows).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(loaded, plain, atol=1e-2)


def test_the_folder_has_the_shape_that_servers_load(seed_folders, tmp_path):
    merge_folders(seed_folders, tmp_path / "fused")
    config = json.loads((tmp_path / "fused" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 3 * 4 + 1
    assert config["target_modules"] == sorted(config["target_modules"])
    assert len(config["target_modules"]) == 7
    assert (config["use_rslora"], config["use_dora"], config["bias"]) == (False, False, "none")
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert not config["modules_to_save"]
    assert config["init_lora_weights"] is True
    record = json.loads((tmp_path / "fused" / "fusion.json").read_text())
    assert record["method"] == "seedlora"
    assert [len(entry["sha256"]) for entry in record["inputs"]] == [64] * 3


def test_without_the_mean_the_rank_is_the_sum_of_the_ranks(seed_folders):
    stacks = stack_adapters({folder.name: read_adapter(folder) for folder in seed_folders})
    layers = merge_stacks(stacks, make_rule("seedlora", {"mean_shift": False}))
    assert {factors.rank for factors in layers.values()} == {12}


def test_one_adapter_merges_to_itself(seed_folders):
    (path, factors), *_ = read_adapter(seed_folders[0]).layers.items()
    torch.testing.assert_close(seedlora(factors).dense(), factors.dense(), msg=path)


def damage(folder, kind):
    config = folder / "adapter_config.json"
    weights = folder / "adapter_model.safetensors"
    if kind == "no config":
        config.unlink()
    elif kind == "config cut short":
        config.write_text(config.read_text()[:40])
    elif kind == "no weights":
        weights.unlink()
    elif kind == "weights cut short":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind in ("nan", "another base", "dora", "half missing"):
        tensors, entries = load_file(weights), json.loads(config.read_text())
        name = next(key for key in tensors if "lora_B" in key)
        if kind == "nan":
            tensors[name][0, 0] = float("nan")
        if kind == "half missing":
            del tensors[name]
        entries |= {"another base": {"base_model_name_or_path": "other"}, "dora": {"use_dora": True}}.get(kind, {})
        save_file(tensors, weights)
        config.write_text(json.dumps(entries))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no config", "it has no adapter_config.json"),
        ("config cut short", "cannot be read"),
        ("no weights", "is missing; pickled weights"),
        ("weights cut short", "not a whole safetensors file"),
        ("nan", "holds NaN or infinity"),
        ("half missing", "has no .lora_B.weight beside it"),
        ("another base", "belongs to base model"),
        ("dora", "use_dora is set, but .* has no .lora_magnitude_vector"),
    ],
)
def test_broken_adapters_are_refused_before_anything_is_written(seed_folders, tmp_path, kind, message):
    damage(seed_folders[1], kind)
    with pytest.raises(AdapterError, match=message) as caught:
        merge_folders(seed_folders, tmp_path / "fused")
    assert "seed_42" in str(caught.value)
    assert not (tmp_path / "fused").exists()


@pytest.mark.parametrize("kind", PLAIN_KINDS)
def test_fused_adapters_are_what_peft_loads(kind, tmp_path):
    """The soup of two adapters, loaded by PEFT, adds the mean of what they add."""
    make, config = PLAIN_KINDS[kind]
    added = []
    base = make().state_dict()
    for seed in (1, 2):
        merged = merged_weights(save_adapter(tmp_path / str(seed), make, seed=seed, **config))
        added.append({key: merged[key] - base[key] for key in base})
    make().save_pretrained(tmp_path / "base")
    merge_folders([tmp_path / "1", tmp_path / "2"], tmp_path / "out", method="soup", base=tmp_path / "base")
    loaded = PeftModel.from_pretrained(make(), tmp_path / "out")
    keys = set(load_file(tmp_path / "out" / WEIGHTS_NAME))
    own = {key.replace(".default", "") for key in loaded.state_dict() if "lora_" in key}
    assert kind == "partial" or keys == own
    found = merged_weights(loaded)
    for key in base:
        assert torch.allclose(found[key] - base[key], (added[0][key] + added[1][key]) / 2, atol=1e-4), key


@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head", "q_proj"]])
def test_resized_vocabularies_are_not_cut(targets, tmp_path):
    """PEFT's folder has the new rows of the base beside the factors; the fused one has not."""

    def resized():
        model = small_llama()
        model.resize_token_embeddings(34)
        return model

    small_llama().save_pretrained(tmp_path / "base")
    resized().save_pretrained(tmp_path / "resized")
    save_adapter(tmp_path / "a", resized, r=2, target_modules=targets)
    one = [tmp_path / "a"]
    with pytest.raises(AdapterError, match=f"{targets[0]} was adapted over 34 rows, and whether .* is not known here"):
        merge_folders(one, tmp_path / "out")
    with pytest.raises(AdapterError, match=f"{targets[0]} was adapted over 34 rows, but the base model .*base has 32"):
        merge_folders(one, tmp_path / "out", base=tmp_path / "base")
    assert not (tmp_path / "out").exists()
    merge_folders(one, tmp_path / "out", method="soup", base=tmp_path / "resized")
    found, wanted = (merged_weights(PeftModel.from_pretrained(resized(), tmp_path / name)) for name in ("out", "a"))
    assert all(torch.allclose(found[key], wanted[key], atol=1e-5) for key in wanted)


class Numbered(torch.nn.Module):
    """Layers whose last name is a number, beside a list of blocks that are numbered as well."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"proj": torch.nn.Linear(6, 6)}) for _ in range(3)])
        self.mlp = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.GELU(), torch.nn.Linear(8, 6))

    def forward(self, x):
        for layer in self.layers:
            x = layer["proj"](x)
        return self.mlp(x)


@torch.no_grad()
def test_layers_that_are_named_by_a_number_are_found_by_peft(tmp_path):
    model = save_adapter(tmp_path / "a", Numbered, r=2, target_modules=["mlp.0", "mlp.2", "proj"])
    merge_folders([tmp_path / "a"], tmp_path / "out", method="soup")
    assert json.loads((tmp_path / "out" / CONFIG_NAME).read_text())["target_modules"] == ["mlp.0", "mlp.2", "proj"]
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(PeftModel.from_pretrained(Numbered(), tmp_path / "out")(x), model(x))


def test_the_fused_folder_is_universal(tmp_path):
    for seed in (1, 2):
        save_adapter(tmp_path / str(seed), seed=seed, **PLAIN_KINDS["rslora and patterns"][1])
    merge_folders([tmp_path / "1", tmp_path / "2"], tmp_path / "out", method="ties", dtype=torch.bfloat16)
    config = json.loads((tmp_path / "out" / CONFIG_NAME).read_text())
    assert config["r"] == config["lora_alpha"]
    assert not config["use_rslora"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["init_lora_weights"] is True
    assert sorted(config["target_modules"]) == sorted(SEVEN)
    tensors = load_file(tmp_path / "out" / WEIGHTS_NAME)
    assert len(tensors) == 2 * 2 * 7
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert {min(t.shape) for t in tensors.values()} == {config["r"]}
    record = json.loads((tmp_path / "out" / FUSION_NAME).read_text())
    assert record["method"] == "ties"
    assert 0 < record["compression"]["relative_error_mean"] <= record["compression"]["relative_error_max"] < 1
    assert [len(source["sha256"]) for source in record["inputs"]] == [64, 64]
    assert "relative Frobenius error" in (tmp_path / "out" / "README.md").read_text()


def _opposite(folder, out):
    """Copy an adapter with the sign of its update turned."""
    shutil.copytree(folder, out)
    tensors = load_file(folder / WEIGHTS_NAME)
    save_file({key: -tensor if "lora_B" in key else tensor for key, tensor in tensors.items()}, out / WEIGHTS_NAME)


@pytest.mark.parametrize("how", ["untrained", "cancelled", "weights"])
@pytest.mark.parametrize("into_base", [False, True])
def test_a_result_that_is_zero_is_said(how, into_base, tmp_path, capsys):
    small_llama().save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "a", r=2, lora_alpha=5, target_modules=["q_proj", "up_proj"])
    if how == "untrained":
        get_peft_model(small_llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "b")
        given, more = [tmp_path / "b"], []
    elif how == "cancelled":
        _opposite(tmp_path / "a", tmp_path / "b")
        given, more = [tmp_path / "a", tmp_path / "b"], []
    else:
        given, more = [tmp_path / "a"], ["--weights", "[0.0]"]
    more += ["--into_base", str(tmp_path / "base")] if into_base else []
    words = ["merge", *map(str, given), "--method", "soup", *more, "--out", str(tmp_path / "out")]
    code, said = main(words), capsys.readouterr()
    if how == "weights" and code == 2:
        assert "weights" in said.err
        return
    assert code == 0
    assert "the result is zero in all layers, so it will change nothing" in said.out
    assert json.loads((tmp_path / "out" / "fusion.json").read_text())["changes_nothing"] is True


def test_a_result_that_is_something_says_nothing_of_zero(seed_folders, tmp_path, capsys):
    assert main(["merge", *map(str, seed_folders), "--out", str(tmp_path / "out")]) == 0
    assert "change nothing" not in capsys.readouterr().out
    assert "changes_nothing" not in json.loads((tmp_path / "out" / "fusion.json").read_text())


def test_modules_to_save_are_ends_of_names_as_peft_has_it(tmp_path):
    """``norm`` is every layer norm."""
    small_llama().save_pretrained(tmp_path / "base")
    wanted = {}
    for seed in (1, 2):
        model = save_adapter(
            tmp_path / str(seed), seed=seed, r=2, target_modules=["q_proj"], modules_to_save=["norm"], task_type=None
        )
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.data += seed
        model.save_pretrained(tmp_path / str(seed))
        for key, weight in merged_weights(model).items():
            wanted[key] = wanted.get(key, 0) + weight / 2
    merge_folders([tmp_path / "1", tmp_path / "2"], tmp_path / "out", method="soup", base=tmp_path / "base")
    found = merged_weights(PeftModel.from_pretrained(small_llama(), tmp_path / "out"))
    assert len([key for key in wanted if "layernorm" in key and (wanted[key] - 1).abs().min() > 1]) == 4
    assert all(torch.allclose(found[key], wanted[key], atol=1e-4) for key in wanted)
    merge_into_base([tmp_path / "1", tmp_path / "2"], tmp_path / "base", tmp_path / "whole", method="soup")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").state_dict()
    assert all(torch.allclose(whole[key], wanted[key], atol=1e-4) for key in wanted)


def test_what_the_inputs_differ_in_is_left_behind_and_said(seed_folders, tmp_path, capsys):
    for name, style in (("a", "alpaca"), ("b", "plain")):
        shutil.copytree(seed_folders["ab".index(name)], tmp_path / name)
        (tmp_path / name / "prompt.json").write_text(json.dumps({"style": style}))
    (tmp_path / "b" / "vocab.json").write_text("{}")
    assert main(["merge", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")]) == 0
    assert "because the inputs differ in them: prompt.json, vocab.json;" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "fusion.json").read_text())["differing"] == ["prompt.json", "vocab.json"]
    assert not (tmp_path / "out" / "prompt.json").exists()
    assert main(["merge", str(tmp_path / "a"), "--out", str(tmp_path / "alone")]) == 0
    assert "inputs differ" not in capsys.readouterr().out
    assert (tmp_path / "alone" / "prompt.json").exists()


def test_no_record_beside_an_adapter_names_the_home_folder(tmp_path, monkeypatch):
    """But for the base model in adapter_config.json, which PEFT has to find."""
    home = tmp_path / "häuser" / "me"
    monkeypatch.setenv("HOME", str(home))
    small_llama().save_pretrained(home / "base")
    for seed in (1, 2):
        save_adapter(home / "in" / str(seed), seed=seed, r=2, target_modules=["q_proj"])
        config = json.loads((file := home / "in" / str(seed) / CONFIG_NAME).read_text())
        file.write_text(json.dumps(config | {"base_model_name_or_path": str(home / "base")}))
    given = [home / "in" / "1", home / "in" / "2"]
    merge_folders(given, home / "made" / "out", method="soup", base=home / "base")
    merge_into_base(given, home / "base", home / "made" / "whole", method="soup")
    told = {str(home), json.dumps(str(home))[1:-1]}
    holding = [
        file.relative_to(home / "made").as_posix()
        for out in ("out", "whole")
        for file in (home / "made" / out).iterdir()
        if any(name.encode() in file.read_bytes() for name in told)
    ]
    assert holding == [f"out/{CONFIG_NAME}"]
    record = json.loads((home / "made" / "out" / "fusion.json").read_text())
    assert [each["name"] for each in record["inputs"]] == ["~/in/1", "~/in/2"]
    assert (record["base_model"], record["base"]) == ("~/base", "~/base")


def test_nothing_is_written_through_links_or_outside_of_the_output(seed_folders, tmp_path):
    """A link in an input is read or left, and what it points to stays; a link as output is what is replaced."""
    secret = tmp_path / "secret"
    secret.write_text("mine")
    shutil.copytree(seed_folders[0], tmp_path / "a")
    for name in ("prompt.json", "README.md", "fusion.json", "chat_template.jinja", "tokenizer.json"):
        (tmp_path / "a" / name).unlink(missing_ok=True)
        (tmp_path / "a" / name).symlink_to(secret)
    (tmp_path / "older").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "older", target_is_directory=True)
    before = set(tmp_path.iterdir())
    merge_folders([tmp_path / "a"], tmp_path / "link", method="soup")
    assert secret.read_text() == "mine"
    assert set(tmp_path.iterdir()) == before
    assert not [path for path in (tmp_path / "older").rglob("*") if path.is_symlink()]
    merge_folders([tmp_path / "a"], tmp_path / "older" / ".." / "beside", method="soup")
    assert set(tmp_path.iterdir()) == before | {tmp_path / "beside"}


def test_names_of_layers_lead_out_of_no_folder(tmp_path):
    save_adapter(tmp_path / "a", r=2, target_modules=["q_proj"])
    tensors = load_file(tmp_path / "a" / WEIGHTS_NAME)
    odd = {key.replace("model.layers", "../../model.layers"): tensor for key, tensor in tensors.items()}
    save_file(odd, tmp_path / "a" / WEIGHTS_NAME)
    before = {path.name for path in tmp_path.parent.iterdir()}
    with contextlib.suppress(AdapterError):
        merge_folders([tmp_path / "a"], tmp_path / "out", method="soup")
    assert {path.name for path in tmp_path.parent.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} <= {"a", "out"}
