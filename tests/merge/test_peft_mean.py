"""What PEFT's ``add_weighted_adapter`` makes of the same adapters: ``docs/adapters.md`` has this table."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from seedlora.merge.adapter_folders import merge_folders
from tests.helpers.adapter_kinds import distance, load_base

REFUSED = "Cannot add weighted adapters if they target the same module with modules_to_save"
#: How far off it is, in silence, by ``svd`` and by ``cat``; 0 is right.
PEFT_RESULT = {
    "lora": (0, 0),
    "alpha_pattern": (0, 0),
    "rank_pattern": (0, 0),
    "mica": (0, 0),
    "rslora": (3.0, 2.5),
    "dora": (0.5, 0.5),
    "lora_bias": (0.6, 0.6),
    "pissa": (0.34, 0.33),
    "olora": (0.33, 0.32),
    "modules_to_save": REFUSED,
}


def peft_mean(case, combination, folder, *, svd_rank=16):
    """The mean by PEFT: all adapters in one model, a third of each; saved, loaded again, and merged into the base."""
    names = ["first", "second", "third"]  # a "0" would be taken for a layer's number when the result is saved
    model = PeftModel.from_pretrained(load_base(case.base), case.folders[0], adapter_name=names[0])
    for name, other in zip(names[1:], case.folders[1:], strict=True):
        model.load_adapter(other, adapter_name=name)
    rank = {"svd_rank": svd_rank} if combination == "svd" else {}
    model.add_weighted_adapter(names, [1 / 3] * 3, "mean", combination_type=combination, **rank)
    model.save_pretrained(folder, selected_adapters=["mean"])
    return case.changed(folder / "mean")


@pytest.mark.parametrize("combination", ["svd", "cat"])
@pytest.mark.parametrize("kind", PEFT_RESULT)
def test_the_mean_by_peft_is_off_as_the_docs_say(kind, combination, adapters_of, tmp_path):
    """Ours is right on each (test_adapter_kinds.py); where PEFT changes for the better, the table is out of date."""
    case = adapters_of(kind)
    if PEFT_RESULT[kind] == REFUSED:
        with pytest.raises(ValueError, match=REFUSED):
            peft_mean(case, combination, tmp_path)
        return
    wanted = PEFT_RESULT[kind][("svd", "cat").index(combination)]
    assert distance(peft_mean(case, combination, tmp_path), case.mean) == pytest.approx(wanted, rel=0.2, abs=1e-5)


def test_a_rank_pattern_is_compressed_optimally_by_peft_and_by_us(adapters_of, tmp_path):
    """By PEFT, saved and loaded again, and by us: neither applies the pattern of the inputs to the result."""
    case = adapters_of("rank_pattern")
    rest = [torch.linalg.svdvals(update.double())[3:] for update in case.mean.values() if update.any()]
    whole = sum(float(update.double().square().sum()) for update in case.mean.values())
    best = (sum(float(s.square().sum()) for s in rest) / whole) ** 0.5
    merge_folders(case.folders, tmp_path / "out", method="soup", options={"rank": 3, "match_norm": False})
    assert best > 0.3
    assert distance(case.changed(tmp_path / "out"), case.mean) == pytest.approx(best, rel=1e-4)
    assert distance(peft_mean(case, "svd", tmp_path, svd_rank=3), case.mean) == pytest.approx(best, rel=1e-4)
