"""What is averaged beside the factors: modules that were trained in full, and biases."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from seedlora.adapters.adapter import WEIGHTS_NAME, AdapterError
from seedlora.merge.adapter_folders import merge_folders
from seedlora.merge.averages import average_modules
from seedlora.merge.registry import make_rule
from seedlora.names import FUSION_NAME
from seedlora.selection.choice import soup_of
from seedlora.updates.factors import LoRAFactors


def test_members_and_weights_of_a_rule_say_what_is_averaged():
    each = {"lm_head.weight": [torch.full((2, 2), x) for x in (1.0, 2.0, 6.0)]}
    assert average_modules(each, make_rule("soup"))["lm_head.weight"].unique().item() == 3
    assert average_modules(each, make_rule("soup", {"weights": [1, 0, 3]}))["lm_head.weight"].unique().item() == 19 / 4
    assert average_modules(each, soup_of([2, 0]))["lm_head.weight"].unique().item() == 3.5
    with pytest.raises(AdapterError, match="must be 3 numbers"):
        average_modules(each, make_rule("soup", {"weights": [1, 2]}))


def test_weights_of_the_rule_weigh_what_is_averaged(adapters_of, tmp_path):
    case = adapters_of("modules_to_save")
    options = {"weights": [1.0, 2.0, 3.0]}
    merge_folders(case.folders, tmp_path / "out", method="soup", options=options)
    found = load_file(tmp_path / "out" / WEIGHTS_NAME)
    each = [load_file(folder / WEIGHTS_NAME) for folder in case.folders]
    for key in ("base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"):
        wanted = (each[0][key] + 2 * each[1][key] + 3 * each[2][key]) / 6
        torch.testing.assert_close(found[key], wanted)
    record = json.loads((tmp_path / "out" / FUSION_NAME).read_text())
    assert record["averaged"] == ["lm_head.weight", "model.embed_tokens.weight"]
    assert "averaged" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(AdapterError, match="add up to more than 0"):
        merge_folders(case.folders, tmp_path / "no", method="soup", options={"weights": [1, 1, -2]})


@pytest.mark.parametrize(("kind", "held"), [("modules_to_save", "lm_head.weight"), ("lora_bias", "lora_bias")])
def test_a_rule_that_leaves_adapters_out_averages_nothing(kind, held, adapters_of, tmp_path):
    score = {"score": lambda layers: 0.0}
    with pytest.raises(AdapterError, match=f"greedy_soup chooses among adapters, and {held} would be the mean of all"):
        merge_folders(adapters_of(kind).folders, tmp_path / "out", method="greedy_soup", options=score)
    merge_folders(adapters_of("lora").folders, tmp_path / "out", method="greedy_soup", options=score)
    merge_folders(adapters_of(kind).folders, tmp_path / "two", method=soup_of([2, 0]))
    merge_folders([adapters_of(kind).folders[i] for i in (0, 2)], tmp_path / "soup", method="soup")
    found, wanted = (load_file(tmp_path / name / WEIGHTS_NAME) for name in ("two", "soup"))
    keys = {key for key in wanted if "lora_A" not in key and "lora_B.w" not in key}
    assert keys
    assert all(torch.equal(found[key], wanted[key]) for key in keys)


def test_a_rule_s_own_weights_are_its_own(adapters_of, tmp_path):
    def first(stack, *, weights):
        assert weights == "of another meaning"
        return LoRAFactors(stack.A[:1], stack.B[:1])

    merge_folders(
        adapters_of("lora").folders, tmp_path / "out", method=make_rule(first, {"weights": "of another meaning"})
    )


def test_an_average_is_no_coarser_than_the_finest_input_and_not_rounded_on_its_way_into_a_base():
    half, whole = torch.full((2, 2), 1.0, dtype=torch.float16), torch.full((2, 2), 1 + 2**-13)
    for order in ([half, whole], [whole, half]):
        mean = average_modules({"lm_head.weight": order}, make_rule("soup"))["lm_head.weight"]
        assert (mean.dtype, mean.unique().item()) == (torch.float32, 1 + 2**-14)
    other = torch.full((2, 2), 1 + 2**-10, dtype=torch.float16)
    mean = average_modules({"lm_head.weight": [half, other]}, make_rule("soup"), rounded=False)["lm_head.weight"]
    assert (mean.dtype, mean.unique().item()) == (torch.float32, 1 + 2**-11)
