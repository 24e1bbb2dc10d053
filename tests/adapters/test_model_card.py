"""The cards of what was trained and merged."""

from __future__ import annotations

import json
import shutil

import pytest

from seedlora.adapters.model_card import refresh_card
from seedlora.adapters.reading import read_adapter
from seedlora.merge.adapter_folders import merge_folders
from seedlora.merge.into_base import merge_into_base
from seedlora.names import FUSION_NAME
from tests.helpers.adapter_folders import dense_updates
from tests.helpers.adapter_kinds import load_base
from tests.helpers.models import SEEDS
from tests.helpers.training import train

SCORED = {"metric": "exact match", "mean_seed": None, "seed_spread": None, "best_seed": None, "differences": {}}


def test_the_card_tells_training_gains_and_scores(seed_folders, tmp_path):
    run = {"data": "ReasoningGym", "model.r": 4, "epochs per seed": 1, "model.base_model": "not told twice"}
    (tmp_path / "run.json").write_text(json.dumps(run))
    score = {"value": 0.25, "low": 0.1, "high": 0.5, "n": 12}
    labels = ("base", "seed_11", "seed_42", "seed_202", "soup", "fused", "another")
    found = SCORED | {"scores": dict.fromkeys(labels, score)}
    (tmp_path / "results.json").write_text(json.dumps(found))
    merge_folders(seed_folders, tmp_path / "fused", method="seedlora_gain", options={"p": 1.0, "cap": 3.0, "rank": 9})
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


def test_the_card_tells_nothing_of_another_run(seed_folders, tmp_path):
    run = tmp_path / "another"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"data": "ReasoningGym", "model.quantization": "nf4"}))
    score = {"value": 0.25, "low": 0.1, "high": 0.5, "n": 12}
    found = SCORED | {"scores": dict.fromkeys(("base", "seed_11", "seed_42", "soup"), score)}
    (run / "results.json").write_text(json.dumps(found))
    merge_folders(seed_folders, run / "fused")
    card = (run / "fused" / "README.md").read_text()
    assert not [word for word in ("ReasoningGym", "nf4", "25.0") if word in card]
    shutil.copytree(seed_folders[0], run / "seed_11")
    merge_folders([run / "seed_11", seed_folders[1]], run / "mixed")
    assert "25.0" not in (run / "mixed" / "README.md").read_text()
    merge_folders([run / "seed_11"], run / "own")
    card = (run / "own" / "README.md").read_text()
    assert not [word for word in ("ReasoningGym", "in nf4", "| seed_11 | 25.0 |") if word not in card]


def test_the_gain_in_the_record_is_that_of_the_dense_updates(seed_folders, tmp_path):
    merge_folders(seed_folders, tmp_path / "fused", method="seedlora", options={"mean_shift": False})
    record = json.loads((tmp_path / "fused" / "fusion.json").read_text())
    gains = []
    for path, factors in read_adapter(tmp_path / "fused").layers.items():
        mean = dense_updates(seed_folders, path).mean(0)
        gains.append(float(factors.dense()[0].double().norm() / mean.norm()))
    assert record["gain"] == pytest.approx(
        {"mean": sum(gains) / len(gains), "min": min(gains), "max": max(gains)}, rel=1e-5
    )
    merge_folders(seed_folders, tmp_path / "soup", method="soup")
    assert json.loads((tmp_path / "soup" / "fusion.json").read_text())["gain"]["max"] == pytest.approx(1)


def test_cards_say_what_base_an_adapter_belongs_to(tiny_llama, tmp_path):
    callback = train(tiny_llama, tmp_path, SEEDS[:2], adapter="loftq", quantization="nf4", max_steps=1)
    wanted = "belongs on the base model in nf4, not on the original"
    assert wanted in (callback.adapter_path(42) / "README.md").read_text()
    merge_folders([callback.adapter_path(seed) for seed in SEEDS[:2]], tmp_path / "fused")
    assert wanted in (tmp_path / "fused" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_card_of_a_merged_model_says_what_that_of_an_adapter_says(kind, adapters_of, tmp_path):
    """The card with the gain, and the prompt of the training, without which it would be asked in another style."""
    case = adapters_of(kind)
    folders = [shutil.copytree(folder, tmp_path / folder.name) for folder in case.folders]
    for folder in folders:
        (folder / "prompt.json").write_text('{"style": "mine"}')
    merge_into_base(folders, case.base, tmp_path / "full", options={"mean_shift": False})
    merge_folders(folders, tmp_path / "out", options={"mean_shift": False, "rank": 16})
    gains = []
    full = load_base(tmp_path / "full").state_dict()
    for key, mean in case.mean.items():
        if mean.any():
            gains.append(float((full[key] - case.before[key]).double().norm() / mean.double().norm()))
    wanted = {"mean": sum(gains) / len(gains), "min": min(gains), "max": max(gains)}
    for name in ("full", "out"):
        record = json.loads((tmp_path / name / FUSION_NAME).read_text())
        assert record["gain"] == pytest.approx(wanted, rel=1e-4)
        assert (tmp_path / name / "prompt.json").read_text() == '{"style": "mine"}'
        card = (tmp_path / name / "README.md").read_text()
        assert f"The fused update is {wanted['mean']:.3g} times as long as the mean of the inputs" in card
        assert "# 3 LoRA adapters merged with `seedlora`" in card
        assert ("Kinds of the inputs: DoRA" in card) == (kind == "dora")
    assert "library_name: transformers" in (tmp_path / "full" / "README.md").read_text()
    assert f"--into_base {case.base}" in (tmp_path / "full" / "README.md").read_text()
