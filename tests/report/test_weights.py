"""What a report says of the weights, against dense updates."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from seedlora.merge.inputs import read_adapters
from tests.helpers.report_runs import SEEDS


def test_weights_against_the_dense_updates(stored):
    found = json.loads((stored / "report.json").read_text())["weights"]
    adapters = [adapter.layers for adapter in read_adapters([stored / name for name in (*SEEDS, "fused")]).values()]
    paths = list(adapters[0])
    dense = [{path: layers[path].dense()[0].double() for path in paths} for layers in adapters]
    long = torch.stack([torch.cat([update[path].flatten() for path in paths]) for update in dense[:3]])
    unit = long / long.norm(dim=1, keepdim=True)
    assert np.array(found["cosines"]) == pytest.approx((unit @ unit.T).numpy(), abs=1e-5)
    rows = {row["path"]: row for row in found["layers"]}
    assert set(rows) == set(paths)
    assert rows["model.layers.1.mlp.up_proj"]["layer"] == 1
    for path in paths:
        mean = (dense[0][path] + dense[1][path] + dense[2][path]) / 3
        assert rows[path]["applied_gain"] == pytest.approx(float(dense[3][path].norm() / mean.norm()), rel=1e-4)
    values = torch.linalg.svdvals(dense[1][found["spectra"]["path"]])[:8]
    assert found["spectra"]["singular_values"]["seed_42"] == pytest.approx(values.tolist(), rel=1e-4)
    drawn = found["distributions"]
    assert list(drawn["density"]) == [*SEEDS, "soup", "fused"]
    assert drawn["layers"] == [f"model.layers.1.self_attn.{name}_proj" for name in "koqv"]
    width = drawn["edges"][1] - drawn["edges"][0]
    soup = {path: sum(update[path] for update in dense[:3]) / 3 for path in paths}
    for label, updates in zip(drawn["density"], (*dense[:3], soup, dense[3]), strict=True):
        entries = torch.cat([updates[path].flatten() for path in drawn["layers"]]).numpy()
        assert drawn["entries"] == len(entries)
        assert drawn["std"][label] == pytest.approx(entries.std(), rel=1e-4)
        counts = np.histogram(entries, drawn["edges"])[0]
        # An entry within rounding of an edge may be on its other side.
        assert np.abs(np.array(drawn["density"][label]) * width * len(entries) - counts).sum() <= 6
