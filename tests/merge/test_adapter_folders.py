"""The fused adapter, from folder to logits, against the paper's formula on dense float64 matrices."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from seedlora.adapters.adapter import AdapterError
from seedlora.adapters.model_card import refresh_card
from seedlora.adapters.reading import read_adapter
from seedlora.adapters.writing import write_adapter
from seedlora.merge.adapter_folders import merge_folders
from seedlora.merge.inputs import stack_adapters
from seedlora.merge.layers import merge_stacks
from seedlora.merge.methods.seedlora import seedlora
from seedlora.merge.registry import make_rule
from tests.helpers.models import built

SEEDS = (11, 42, 202)


def paper_formula(updates: torch.Tensor) -> torch.Tensor:
    """Equations 4 and 5 on dense updates (N, D, K), as printed."""
    updates = updates.double()
    average = updates.mean(0)
    mu = updates.mean((1, 2)).mean()
    sigma = updates.flatten(1).std(1).mean()
    return sigma * (average - average.mean()) / average.std() + mu


@pytest.fixture
def folders(tiny_llama, tmp_path):
    module = built(tiny_llama, *SEEDS)
    for seed in SEEDS:
        write_adapter(
            tmp_path / f"seed_{seed}", module.stack.stored_factors(f"seed_{seed}"), module.options.lora_config()
        )
    return [tmp_path / f"seed_{seed}" for seed in SEEDS]


def dense_updates(folders, path):
    """B @ A * lora_alpha / r from the files, without our reader."""
    from safetensors.torch import load_file

    updates = []
    for folder in folders:
        tensors = load_file(folder / "adapter_model.safetensors")
        config = json.loads((folder / "adapter_config.json").read_text())
        a, b = (tensors[f"base_model.model.{path}.lora_{x}.weight"].double() for x in "AB")
        updates.append(b @ a * config["lora_alpha"] / config["r"])
    return torch.stack(updates)


def test_the_fused_adapter_is_the_paper_s_formula(folders, tmp_path):
    merge_folders(folders, tmp_path / "fused")
    fused = read_adapter(tmp_path / "fused").layers
    assert len(fused) == 14
    for path, factors in fused.items():
        expected = paper_formula(dense_updates(folders, path))
        assert ((factors.dense()[0].double() - expected).norm() / expected.norm()).item() < 1e-6


@torch.no_grad()
def test_peft_loads_it_and_computes_base_plus_the_dense_update(folders, tmp_path, tiny_llama):
    merge_folders(folders, tmp_path / "fused")
    rows = torch.arange(20).view(2, 10)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "fused")(input_ids=rows).logits
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    plain = dense(input_ids=rows).logits
    for path in read_adapter(tmp_path / "fused").layers:
        dense.get_submodule(path).weight += paper_formula(dense_updates(folders, path)).float()
    torch.testing.assert_close(loaded, dense(input_ids=rows).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(loaded, plain, atol=1e-2)


def test_the_folder_has_the_shape_that_servers_load(folders, tmp_path):
    merge_folders(folders, tmp_path / "fused")
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


def test_without_the_mean_the_rank_is_the_sum_of_the_ranks(folders):
    stacks = stack_adapters({folder.name: read_adapter(folder) for folder in folders})
    layers = merge_stacks(stacks, make_rule("seedlora", {"mean_shift": False}))
    assert {factors.rank for factors in layers.values()} == {12}


def test_one_adapter_is_its_own_fusion(folders):
    (path, factors), *_ = read_adapter(folders[0]).layers.items()
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
        from safetensors.torch import load_file, save_file

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
def test_broken_adapters_are_refused_before_anything_is_written(folders, tmp_path, kind, message):
    damage(folders[1], kind)
    with pytest.raises(AdapterError, match=message) as caught:
        merge_folders(folders, tmp_path / "fused")
    assert "seed_42" in str(caught.value)
    assert not (tmp_path / "fused").exists()


SCORED = {"metric": "exact match", "mean_seed": None, "seed_spread": None, "best_seed": None, "differences": {}}


def test_the_card_tells_training_gains_and_scores(folders, tmp_path):
    run = {"data": "ReasoningGym", "model.r": 4, "epochs per seed": 1, "model.base_model": "not told twice"}
    (tmp_path / "run.json").write_text(json.dumps(run))
    score = {"value": 0.25, "low": 0.1, "high": 0.5, "n": 12}
    labels = ("base", "seed_11", "seed_42", "seed_202", "soup", "fused", "another")
    found = SCORED | {"scores": dict.fromkeys(labels, score)}
    (tmp_path / "results.json").write_text(json.dumps(found))
    merge_folders(folders, tmp_path / "fused", method="seedlora_gain", options={"p": 1.0, "cap": 3.0, "rank": 9})
    card = (tmp_path / "fused" / "README.md").read_text()
    assert "| data | ReasoningGym |" in card
    assert "| epochs per seed | 1 |" in card
    assert "| seed_42 | 25.0 | 10.0 to 50.0 |" in card
    assert "another" not in card
    assert "**this adapter**" not in card  # it was not scored yet
    command = "python -m seedlora merge seed_11 seed_42 seed_202 --method seedlora_gain --p 1.0 --cap 3.0 --rank 9"
    assert f"{command} --out fused" in card
    refresh_card(tmp_path / "fused")
    again = (tmp_path / "fused" / "README.md").read_text()
    assert again.replace("| **this adapter** | 25.0 | 10.0 to 50.0 |\n", "") == card


def test_the_card_tells_nothing_of_another_run(folders, tmp_path):
    run = tmp_path / "another"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"data": "ReasoningGym", "model.quantization": "nf4"}))
    score = {"value": 0.25, "low": 0.1, "high": 0.5, "n": 12}
    found = SCORED | {"scores": dict.fromkeys(("base", "seed_11", "seed_42", "soup"), score)}
    (run / "results.json").write_text(json.dumps(found))
    merge_folders(folders, run / "fused")
    card = (run / "fused" / "README.md").read_text()
    assert not [word for word in ("ReasoningGym", "nf4", "25.0") if word in card]
    shutil.copytree(folders[0], run / "seed_11")
    merge_folders([run / "seed_11", folders[1]], run / "mixed")
    assert "25.0" not in (run / "mixed" / "README.md").read_text()
    merge_folders([run / "seed_11"], run / "own")
    card = (run / "own" / "README.md").read_text()
    assert not [word for word in ("ReasoningGym", "in nf4", "| seed_11 | 25.0 |") if word not in card]


def test_the_gain_in_the_card(folders, tmp_path):
    merge_folders(folders, tmp_path / "fused", method="seedlora", options={"mean_shift": False})
    record = json.loads((tmp_path / "fused" / "fusion.json").read_text())
    gains = []
    for path, factors in read_adapter(tmp_path / "fused").layers.items():
        mean = dense_updates(folders, path).mean(0)
        gains.append(float(factors.dense()[0].double().norm() / mean.norm()))
    assert record["gain"] == pytest.approx(
        {"mean": sum(gains) / len(gains), "min": min(gains), "max": max(gains)}, rel=1e-5
    )
    merge_folders(folders, tmp_path / "soup", method="soup")
    assert json.loads((tmp_path / "soup" / "fusion.json").read_text())["gain"]["max"] == pytest.approx(1)
