"""Adapters of every kind, trained and saved by PEFT, merged: against the mean of what they add."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForSequenceClassification

from seedlora.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME, AdapterError
from seedlora.cli.main import main
from seedlora.merge.adapter_folders import merge_folders
from seedlora.merge.into_base import merge_into_base
from seedlora.names import FUSION_NAME
from tests.helpers import reference as ref
from tests.helpers.adapter_kinds import KINDS, PLAIN, SEEDS, distance, load_base, move_trained, one_layer_llama


@pytest.mark.parametrize("kind", KINDS)
def test_the_soup_adds_the_mean_of_what_the_adapters_add(kind, adapters_of, tmp_path):
    """As an adapter of a rank that holds it all, and in the base's weights."""
    case = adapters_of(kind)
    merge_folders(case.folders, tmp_path / "out", method="soup", options={"rank": 32, "svd": "exact"})
    assert distance(case.changed(tmp_path / "out"), case.mean) < 2e-5
    merge_into_base(case.folders, case.base, tmp_path / "full", method="soup")
    full = load_base(tmp_path / "full").state_dict()
    assert distance({key: full[key] - case.before[key] for key in full}, case.mean) < 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_of_any_kind_merges_to_itself(kind, adapters_of, tmp_path):
    case = adapters_of(kind)
    bytes_before = [(folder / WEIGHTS_NAME).read_bytes() for folder in case.folders]
    merge_into_base(case.folders[:1], case.base, tmp_path / "full", method="seedlora")
    full = load_base(tmp_path / "full").state_dict()
    assert distance({key: full[key] - case.before[key] for key in full}, case.added[0]) < 2e-5
    assert bytes_before == [(folder / WEIGHTS_NAME).read_bytes() for folder in case.folders]


@torch.no_grad()
def test_classifiers_stay_classifiers(tmp_path):
    """PEFT saves the head of a classifier beside the factors, and puts it back by the task type alone."""

    def classifier():
        torch.manual_seed(0)
        return LlamaForSequenceClassification(LlamaConfig(**(one_layer_llama().config.to_dict() | {"pad_token_id": 0})))

    rows, logits = torch.arange(1, 21).view(2, 10), []
    for seed in SEEDS:
        model = get_peft_model(classifier(), LoraConfig(**PLAIN, task_type="SEQ_CLS"))
        move_trained(model, seed)
        model.save_pretrained(tmp_path / str(seed))
        logits.append(model.eval()(input_ids=rows).logits)
    merge_folders([tmp_path / str(SEEDS[0])], tmp_path / "one", method="soup")
    found = PeftModel.from_pretrained(classifier(), tmp_path / "one").eval()(input_ids=rows).logits
    torch.testing.assert_close(found, logits[0], atol=1e-5, rtol=1e-4)
    merge_folders([tmp_path / str(seed) for seed in SEEDS], tmp_path / "all", method="soup")
    assert json.loads((tmp_path / "all" / CONFIG_NAME).read_text())["task_type"] == "SEQ_CLS"
    PeftModel.from_pretrained(classifier(), tmp_path / "all")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["rslora", "rank_pattern", "pissa", "olora", "modules_to_save", "lora_bias"])
def test_the_folder_loads_in_peft_with_equal_logits(kind, adapters_of, tmp_path):
    case = adapters_of(kind)
    merge_folders(case.folders, tmp_path / "out", method="soup")
    dense = load_base(case.base)
    mean = case.mean
    dense.load_state_dict({key: case.before[key] + mean[key] for key in mean})
    rows = torch.arange(20).view(2, 10)
    found = PeftModel.from_pretrained(load_base(case.base), tmp_path / "out")(input_ids=rows).logits
    torch.testing.assert_close(found, dense(input_ids=rows).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["dora", "pissa", "conv1d, dora"])
def test_seedlora_in_the_base_weights_is_the_paper_s_formula(kind, adapters_of, tmp_path):
    case = adapters_of(kind)
    merge_into_base(case.folders, case.base, tmp_path / "full")
    full = load_base(tmp_path / "full").state_dict()
    for key in (key for key in full if case.added[0][key].any()):
        wanted = ref.seedlora([added[key].double() for added in case.added])
        found = (full[key] - case.before[key]).double()
        assert float((found - wanted).norm() / wanted.norm()) < 2e-5, key


def test_dora_at_a_rank_says_its_error(adapters_of, tmp_path):
    case = adapters_of("dora")
    words = ["merge", *map(str, case.folders), "--method", "soup", "--rank", "5", "--svd", "exact"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / FUSION_NAME).read_text())
    found, mean = case.changed(tmp_path / "out"), case.mean
    assert record["kinds"] == ["DoRA"]
    for path, error in record["compression"]["layers"].items():
        wanted = mean[f"{path}.weight"]
        best = torch.linalg.svdvals(wanted.double())[5:].norm() / wanted.double().norm()
        assert error == pytest.approx(float(best), rel=1e-3)
        assert float((found[f"{path}.weight"] - wanted).norm() / wanted.norm()) == pytest.approx(error, rel=1e-3)
    assert "relative Frobenius error" in (tmp_path / "out" / "README.md").read_text()


def test_the_default_rank_of_dora_is_that_of_lora(adapters_of, tmp_path):
    case = adapters_of("dora")
    merge_folders(case.folders, tmp_path / "out")
    assert json.loads((tmp_path / "out" / CONFIG_NAME).read_text())["r"] == 3 * 4 + 1


@pytest.mark.parametrize("kind", ["modules_to_save", "lora_bias"])
def test_everything_has_the_dtype_that_is_asked_for(kind, adapters_of, tmp_path):
    merge_folders(adapters_of(kind).folders, tmp_path / "out", method="soup", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / WEIGHTS_NAME).values()} == {torch.bfloat16}


MAGNITUDE = "base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(MAGNITUDE), "use_dora is set, but 'model.layers.0.mlp.up_proj' has no .lora_magnitude_vector"),
        (lambda t: t.update({MAGNITUDE: t[MAGNITUDE][:-1].clone()}), r"has shape \(23,\), \(24,\) is needed"),
        (lambda t: t.update({MAGNITUDE: t[MAGNITUDE] * float("inf")}), "holds NaN or infinity"),
        (
            lambda t: t.update({MAGNITUDE.replace("up_", "x_"): t[MAGNITUDE].clone()}),
            "has .lora_magnitude_vector but no factors",
        ),
    ],
)
def test_broken_magnitudes_are_refused(edit, message, edited_copy, adapters_of, tmp_path):
    with pytest.raises(AdapterError, match=message):
        merge_folders([edited_copy("dora", edit)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_record_says_which_svd_a_layer_got(adapters_of, tmp_path, monkeypatch):
    """Matrices of 16 x 16 and 24 x 16 entries; those of more than 256 are large here."""
    monkeypatch.setattr("seedlora.updates.compression.EXACT_ENTRIES", 256)
    folders = adapters_of("dora").folders
    merge_folders(folders, tmp_path / "out", method="soup", options={"rank": 2})
    found = json.loads((tmp_path / "out" / FUSION_NAME).read_text())["compression"]
    assert found["svd"] == {"exact": 4, "randomized": 3}
    merge_into_base(
        folders, adapters_of("dora").base, tmp_path / "full", options={"rank": 2, "svd": "exact"}, method="soup"
    )
    found = json.loads((tmp_path / "full" / FUSION_NAME).read_text())["compression"]
    assert found["svd"] == {"exact": 7}
